"""apply_shift_ in C++: the bits of the torch form, whatever the rounding, layout and threads."""

from __future__ import annotations

import math

import pytest
import torch
from layouts import LAYOUTS, lay_out, random_rows, same_bits
from shifts import HALVES, dense_shift, make_shift, weight_of

from pyeditfast.backends import backend
from pyeditfast.extension import extension_status, load_extension
from pyeditfast.ops import apply_shift_
from pyeditfast.ops.random_mask import random_uniform
from pyeditfast.reference.apply_shift import round_stochastically

extension = load_extension()
pytestmark = pytest.mark.skipif(extension is None, reason=extension_status())

CASES = [(dtype, rounding) for dtype in HALVES for rounding in ("nearest", "stochastic")]
CASES += [(dtype, "compensated") for dtype in (*HALVES, torch.float32)]
CASES += [(torch.float32, "nearest")]


def options_for(rounding, weight):
    """Return the arguments that a rounding takes beside the shift."""
    if rounding == "stochastic":
        return {"seed": 9}
    if rounding == "compensated":
        return {"remainder": weight * 2.0**-10}
    return {}


def both(weight, shift, rounding, layout="contiguous"):
    """Return what the torch form and the C++ form make of copies of weight and remainder."""
    results = []
    for name in ("torch", "cpp"):
        view = lay_out(weight, layout)[0]
        options = options_for(rounding, view)
        with backend(name):
            apply_shift_(view, shift, rounding, **options)
        results.append((view.clone(), options.get("remainder", view).clone()))
    return results


@pytest.mark.parametrize(("dtype", "rounding"), CASES)
@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 13, 31), (2, 3, 17, 11), (3, 101, 1203)])
def test_the_bits_of_the_torch_form(dtype, rounding, form, sizes):
    shift = make_shift(form, *sizes, scale=1e-2)
    (expected, lost), (result, left) = both(weight_of(sizes, dtype), shift, rounding)
    assert same_bits(result, expected)
    assert same_bits(left, lost)


@pytest.mark.parametrize(("dtype", "rounding"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, rounding, layout):
    weight, shift = weight_of((3, 37, 1029), dtype), make_shift("dual", 3, 37, 1029, scale=1e-2)
    (expected, lost), (result, left) = both(weight, shift, rounding, layout)
    assert same_bits(result, expected)
    assert same_bits(left, lost)


@pytest.mark.parametrize(("dtype", "rounding"), CASES)
def test_a_transposed_shift(dtype, rounding):
    weight, shift = weight_of((3, 37, 1029), dtype), make_shift("primal", 3, 37, 1029, scale=1e-2)
    turned = dense_shift(shift.matrix.T.contiguous().T)
    (expected, lost), (result, left) = both(weight, turned, rounding, "transposed")
    assert same_bits(result, expected)
    assert same_bits(left, lost)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_near_every_number(dtype, rounding):
    """At, below, above and between all finite numbers of the dtype, up to half the largest."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = codes.view(dtype).repeat_interleave(8)
    limit = torch.finfo(dtype).max / 2
    weight = torch.where(weight.double().abs() <= limit, weight, torch.zeros_like(weight))
    weight = weight.reshape(512, 1024)
    spacing = weight.float().abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny / 8
    shares = torch.tensor([0.0, 0.25, -0.25, 0.5, -0.5, 0.499, -0.75, 1.5]).repeat(512, 128)
    shift = dense_shift(spacing * shares)
    (expected, lost), (result, left) = both(weight, shift, rounding)
    assert same_bits(result, expected)
    assert same_bits(left, lost)


@pytest.mark.parametrize(("dtype", "rounding"), CASES)
def test_thread_counts_give_the_same_bits(dtype, rounding):
    weight, shift = weight_of((3, 301, 1023), dtype), make_shift("dual", 3, 301, 1023)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(both(weight, dense_shift(shift.dense()), rounding)[1])
    finally:
        torch.set_num_threads(before)
    for result, left in results:
        assert same_bits(result, results[0][0])
        assert same_bits(left, results[0][1])


def test_blocks_of_rows_take_their_own_random_numbers(monkeypatch):
    from importlib import import_module

    weight, shift = weight_of((3, 37, 129), torch.bfloat16), make_shift("dual", 3, 37, 129)
    with backend("cpp"):
        whole = apply_shift_(weight.clone(), shift, "stochastic", seed=4)
        module = import_module("pyeditfast.ops.apply_shift")
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * 129)
        assert same_bits(apply_shift_(weight.clone(), shift, "stochastic", seed=4), whole)


def test_whoever_saved_the_weight_notices():
    weight = random_rows(3, 4, dtype=torch.bfloat16)
    product = (torch.ones_like(weight, requires_grad=True) * weight).sum()
    with backend("cpp"):
        apply_shift_(weight, dense_shift(torch.ones(3, 4)), "stochastic", seed=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def matrix(tensor, **changes):
    types = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
    figures = {
        "address": tensor.data_ptr(),
        "row_stride": tensor.stride(0),
        "column_stride": tensor.stride(1),
        "type": getattr(extension, types[tensor.dtype]),
    }
    return tuple({**figures, **changes}.values())


def call(tensor, dense, lost=None, **changes):
    arguments = {
        "weight": matrix(tensor),
        "shift": matrix(dense),
        "remainder": None if lost is None else matrix(lost),
        **{"rows": tensor.shape[0], "columns": tensor.shape[1], "threads": 2},
        **{"rounding": 0, "seed": 5, "offset": 0},
    }
    extension.apply_shift(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("dtype", "remainder_dtype", "changes", "message"),
    [
        (torch.float32, None, {"rounding": 3}, "rounding must be from 0 to 2, got 3"),
        (torch.float32, None, {"rounding": 1}, "stochastic rounding is for 16-bit weights"),
        (torch.float32, None, {"rounding": 2}, "remainder is missing"),
        (torch.float32, torch.float32, {}, "a remainder has no meaning for rounding 0"),
        (torch.float16, torch.bfloat16, {"rounding": 2}, "remainder has element type 1 and weight"),
        (torch.float16, None, {"rounding": 1, "offset": -1}, "got offset -1 for 3 x 4"),
        (torch.float16, None, {"rows": -3}, "got -3 and 4"),
        (torch.float16, None, {"threads": 0}, "threads must be >= 1, got 0"),
        (torch.float16, None, {"weight": (0, 4, 1, 2)}, "weight is a null pointer"),
        (torch.float16, None, {"shift": (0, 4, 1, 0)}, "shift is a null pointer"),
        (torch.float16, None, {"shift": (64, -4, 1, 0)}, "shift has strides -4 and 1"),
        (torch.float16, None, {"weight": (64, 3, 1, 2)}, "weight has strides 3 and 1: its 3 x 4"),
    ],
)
def test_the_compiled_function_refuses_bad_arguments(dtype, remainder_dtype, changes, message):
    weight, shift = torch.ones(3, 4, dtype=dtype), torch.ones(3, 4)
    remainder = None if remainder_dtype is None else torch.zeros(3, 4, dtype=remainder_dtype)
    with pytest.raises(ValueError, match=message):
        call(weight, shift, remainder, **changes)
    assert (weight == 1).all()


def test_the_compiled_function_passes_special_values_on():
    special = torch.tensor([[math.nan, math.inf, -math.inf, 0.0, -0.0]])
    for dtype in HALVES:
        for rounding in (0, 1):
            weight = torch.zeros(1, 5, dtype=dtype)
            call(weight, special, rounding=rounding)
            torch.testing.assert_close(weight, special.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (37, 1029), (700, 131)])
def test_largest_magnitude(dtype, layout, sizes):
    view = lay_out(random_rows(*sizes, dtype=dtype), layout)[0]

    def found(threads):
        rows, columns = view.shape
        arguments = {"rows": rows, "columns": columns, "threads": threads}
        return extension.largest_magnitude(x=matrix(view), **arguments)

    for place, value in ((0, -50.0), (view.numel() - 1, 60.0), (view.numel() // 2, -math.inf)):
        for threads in (1, 3):
            assert found(threads) == float(view.abs().max())
        view[place // view.shape[1], place % view.shape[1]] = value
    assert found(2) == math.inf
    view[-1, 0] = math.nan
    assert math.isnan(found(1)) and math.isnan(found(2))


def every_kind_of_number(dtype):
    """Return anything from subnormal numbers to those beyond ``dtype``, in equal shares."""
    codes = torch.randint(-(2**31), 2**31, (300, 1001), generator=torch.Generator().manual_seed(3))
    exact = codes.to(torch.int32).view(torch.float32)
    largest = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max]).repeat(500)
    exact[-1, :1000] = largest * torch.linspace(1, 1 + 2.0**-8, 1000)
    return exact


@pytest.mark.parametrize("dtype", HALVES)
def test_every_kind_of_number_is_rounded_to_nearest_as_by_torch(dtype):
    exact = every_kind_of_number(dtype)
    weight = torch.zeros(exact.shape, dtype=dtype)
    call(weight, exact)
    nan = exact.isnan()
    assert weight[nan].isnan().all()
    assert same_bits(weight[~nan], (exact + 0.0).to(dtype)[~nan])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_kind_of_number_is_rounded_stochastically_as_by_torch(dtype):
    exact = every_kind_of_number(dtype)
    weight = torch.zeros(exact.shape, dtype=dtype)
    call(weight, exact, rounding=1)
    uniform = random_uniform(5, exact.shape)
    expected = round_stochastically(exact, dtype, uniform)
    # What becomes of a NaN's lower bits depends on the processor.
    nan = exact.isnan()
    assert weight[nan].isnan().all()
    # Adding to a weight of 0 makes 0 of -0.
    expected = torch.where(exact == 0, 0.0, expected)
    assert same_bits(weight[~nan], expected[~nan])
