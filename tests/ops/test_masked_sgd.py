"""masked_sgd_: mask, decay, step and clamp, whatever the backend, layout and thread count."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from layouts import LAYOUTS, bits, lay_out, random_rows, same_bits
from thread_counts import assert_same_bits_on_any_threads
from tolerances import assert_as_accurate

from pyeditfast import reference
from pyeditfast.backends import backend, explain
from pyeditfast.errors import UnsupportedWeightError
from pyeditfast.extension import extension_status, load_extension
from pyeditfast.ops.random_mask import random_mask, random_uniform

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.masked_sgd")

extension = load_extension()
needs_extension = pytest.mark.skipif(extension is None, reason=extension_status())

BACKENDS = [
    "auto",
    "reference",
    "torch",
    pytest.param("cpp", marks=needs_extension),
]
SIXTEEN_AND_32_BITS = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 1), (1, 1031), (1031, 1), (7, 13), (3, 2050), (131, 257), (64, 1024), (0, 5), (5, 0)]
STEP = {"seed": 11, "ratio": 0.2, "lr": 0.3, "weight_decay": 1e-2, "norm_constraint": 0.25}


def tensors(shape, dtype, seed=0):
    """Return weight, gradient and main memory, the first two apart from the last."""
    main = random_rows(*shape, seed=seed, dtype=dtype)
    weight = (main.double() + 0.2 * random_rows(*shape, seed=seed + 1).double()).to(dtype)
    return weight, random_rows(*shape, seed=seed + 2, dtype=dtype), main


def assert_same(result, expected):
    """Require equal values, NaN equal to NaN and zeros of either sign equal."""
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("shape", SHAPES)
@needs_extension
def test_cpp_has_the_bits_of_the_reference(shape, dtype):
    weight, grad, main = tensors(shape, dtype)
    expected = reference.masked_sgd_(weight.clone(), grad, main, **STEP)
    with backend("cpp"):
        result = weight.clone()
        assert op.masked_sgd_(result, grad, main, **STEP) is result
    assert same_bits(result, expected)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [*SIXTEEN_AND_32_BITS, torch.float64])
def test_every_backend_is_as_accurate_as_the_formula_in_its_dtype(name, dtype):
    if name == "cpp" and dtype == torch.float64:
        pytest.skip("the C++ form takes no float64")
    weight, grad, main = tensors((67, 129), dtype)
    exact = reference.masked_sgd_(weight.double(), grad.double(), main.double(), **STEP)
    naive = reference.masked_sgd_(weight.clone(), grad, main, **STEP)
    with backend(name):
        result = op.masked_sgd_(weight.clone(), grad, main, **STEP)
    assert_as_accurate(result, naive, exact, 4)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_the_mask_leaves_out_only_decays(name):
    weight, _, main = tensors((41, 83), torch.float32)
    grad = torch.full_like(weight, float("nan"))
    with backend(name):
        mask = random_mask(5, 0.3, weight.shape)
        result = op.masked_sgd_(
            weight.clone(), grad, main, seed=5, ratio=0.3, lr=0.5, weight_decay=0.1
        )
    assert torch.equal(result.isnan(), mask)
    torch.testing.assert_close(result[~mask], (weight * 0.95)[~mask])


@pytest.mark.parametrize("name", BACKENDS)
def test_ratio_zero_and_one(name):
    weight, grad, main = tensors((41, 83), torch.float32)
    with backend(name):
        none = op.masked_sgd_(weight.clone(), grad, main, seed=5, ratio=0.0, lr=0.5)
        all_of_it = op.masked_sgd_(weight.clone(), grad, main, seed=5, ratio=1.0, lr=0.5)
    assert torch.equal(none, weight)
    assert torch.equal(all_of_it, weight - 0.5 * grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_number_equal_to_the_ratio_is_not_below_it(name):
    weight, grad, main = torch.zeros(5, 10), torch.ones(5, 10), torch.zeros(5, 10)
    with backend(name):
        for index, ratio in enumerate(random_uniform(5, (50,)).tolist()):
            step = {"seed": 5, "lr": 1.0, "ratio": ratio}
            assert op.masked_sgd_(weight.clone(), grad, main, **step).flatten()[index] == 0
            step["ratio"] = min(1.0, ratio + 1e-6)
            assert op.masked_sgd_(weight.clone(), grad, main, **step).flatten()[index] == -1


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [*SIXTEEN_AND_32_BITS, torch.float64])
def test_the_result_stays_within_the_constraint(name, dtype):
    if name == "cpp" and dtype == torch.float64:
        pytest.skip("the C++ form takes no float64")
    weight, grad, main = tensors((64, 65), dtype)
    with backend(name):
        free = op.masked_sgd_(weight.clone(), grad, main, seed=1, ratio=0.5, lr=9.0)
        held = op.masked_sgd_(
            weight.clone(), grad, main, seed=1, ratio=0.5, lr=9.0, norm_constraint=0.25
        )
    bound = 0.25 + torch.finfo(dtype).eps * main.abs().double().max()
    assert ((held.double() - main.double()).abs() <= bound).all()
    inside = (free.double() - main.double()).abs() < 0.25
    assert inside.any()
    assert (~inside).any()
    assert torch.equal(held[inside], free[inside])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("d_in", [1028, 1029, 1030])
def test_layouts(name, layout, dtype, d_in):
    weight, grad, main = tensors((37, d_in), dtype)
    with backend(name):
        expected = op.masked_sgd_(weight.clone(), grad, main, **STEP)
        view, storage = lay_out(weight, layout)
        around = storage.isnan()
        op.masked_sgd_(view, lay_out(grad, layout)[0], lay_out(main, layout)[0], **STEP)
    assert same_bits(view.clone(), expected)
    assert torch.equal(storage.isnan(), around)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layouts", [("transposed", "contiguous"), ("contiguous", "transposed")])
def test_mixed_layouts(name, layouts):
    weight, grad, main = tensors((1100, 67), torch.bfloat16)
    with backend(name):
        expected = op.masked_sgd_(weight.clone(), grad, main, **STEP)
        view = lay_out(weight, layouts[0])[0]
        op.masked_sgd_(view, lay_out(grad, layouts[1])[0], lay_out(main, "inside")[0], **STEP)
    assert same_bits(view.clone(), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_expanded_gradient(name):
    weight, grad, main = tensors((37, 29), torch.float32)
    row = grad[:1].expand(37, 29)
    with backend(name):
        expected = op.masked_sgd_(weight.clone(), row.contiguous(), main, **STEP)
        assert torch.equal(op.masked_sgd_(weight.clone(), row, main, **STEP), expected)


@pytest.mark.parametrize("grad_dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@needs_extension
def test_gradients_of_another_dtype(dtype, grad_dtype):
    weight, grad, main = tensors((37, 129), dtype)
    grad = grad.to(grad_dtype)
    expected = reference.masked_sgd_(weight.clone(), grad, main, **STEP)
    with backend("cpp"):
        assert same_bits(op.masked_sgd_(weight.clone(), grad, main, **STEP), expected)


@needs_extension
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
def test_special_values(dtype):
    """NaN, infinities, subnormal numbers, zeros of both signs and the largest numbers, in every
    combination of weight, gradient and main memory."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    numbers = [0.0, -0.0, 1.5, -2.0, math.nan, math.inf, -math.inf, largest, -largest]
    special = torch.tensor([*numbers, smallest, smallest / 2, -smallest / 4], dtype=dtype)
    weight, grad, main = (
        part.reshape(12, 144) for part in torch.meshgrid(special, special, special, indexing="ij")
    )
    for ratio in (0.0, 1.0):
        for constraint in (None, 0.0, 0.5, 1e38, math.inf):
            step = {**STEP, "ratio": ratio, "norm_constraint": constraint}
            expected = reference.masked_sgd_(weight.clone(), grad, main, **step)
            with backend("cpp"):
                assert_same(op.masked_sgd_(weight.clone(), grad, main, **step), expected)


@needs_extension
def test_rounding_is_to_nearest_even():
    """A 16-bit result is the float32 result, rounded once by torch."""
    # Every pattern of the upper half, with the lower half at, below and above the middle.
    upper = torch.arange(65536).repeat_interleave(8) << 16
    lower = torch.tensor([0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0, 1]).repeat(65536)
    grad = (upper + lower).to(torch.int32).view(torch.float32).reshape(512, 1024)
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.zeros(512, 1024, dtype=dtype)
        expected = (0.0 - 1.0 * grad).to(dtype)
        with backend("cpp"):
            result = op.masked_sgd_(weight, grad, weight, seed=0, ratio=1.0, lr=1.0)
        assert_same(result, expected)


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_thread_counts_give_the_same_bits(layout):
    weight, grad, main = (lay_out(part, layout)[0] for part in tensors((301, 1023), torch.bfloat16))
    with backend("cpp"):
        assert_same_bits_on_any_threads(lambda: op.masked_sgd_(weight.clone(), grad, main, **STEP))


@pytest.mark.parametrize("name", BACKENDS)
def test_active_decides_on_the_device(name):
    weight, grad, main = tensors((17, 33), torch.float32)
    with backend(name):
        still = op.masked_sgd_(weight.clone(), grad, main, **STEP, active=torch.tensor(False))
        moved = op.masked_sgd_(weight.clone(), grad, main, **STEP, active=torch.tensor(True))
        expected = op.masked_sgd_(weight.clone(), grad, main, **STEP)
    assert torch.equal(still, weight)
    assert torch.equal(moved, expected)


PRODUCT_SHAPES = [(19, 67, 129), (64, 1, 1), (67, 67, 300), (451, 300, 67)]
"""Tokens, d_out and d_in, few tokens and many: then C++ takes the mask's part of the product."""


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "inside", "every second"])
@pytest.mark.parametrize("dtype", SIXTEEN_AND_32_BITS)
@pytest.mark.parametrize("shape", PRODUCT_SHAPES)
def test_product(name, layout, dtype, shape, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", 7 * 129)
    tokens, d_out, d_in = shape
    weight, _, main = tensors((d_out, d_in), dtype)
    output_grads = random_rows(tokens, d_out, seed=8, dtype=dtype)
    inputs = random_rows(tokens, d_in, seed=9, dtype=dtype)
    doubles = (part.double() for part in (weight, output_grads, inputs, main))
    exact = reference.masked_sgd_product_(*doubles, **STEP)
    naive = reference.masked_sgd_product_(weight.clone(), output_grads, inputs, main, **STEP)
    with backend(name):
        view, storage = lay_out(weight, layout)
        around = storage.isnan()
        result = op.masked_sgd_product_(
            view, output_grads, inputs, lay_out(main, layout)[0], **STEP
        )
    assert result is view
    assert_as_accurate(view.clone(), naive, exact, tokens)
    assert torch.equal(storage.isnan(), around)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 1 / 3, 0.5, 1.0])
def test_product_equals_the_step_with_its_gradient(name, tokens, ratio):
    """On integers, which float32 sums exactly: the blocks of rows take their own part of the
    mask."""
    weight, _, main = tensors((300, 290), torch.float32)
    output_grads = random_rows(tokens, 300, seed=8, scale=3.0).round()
    inputs = random_rows(tokens, 290, seed=9, scale=3.0).round()
    step = {**STEP, "ratio": ratio}
    with backend(name):
        expected = op.masked_sgd_(weight.clone(), output_grads.T @ inputs, main, **step)
        result = op.masked_sgd_product_(weight.clone(), output_grads, inputs, main, **step)
    assert same_bits(result, expected)


@needs_extension
def test_which_form_of_the_product_cpp_takes(monkeypatch):
    taken = []
    for form in ("_compiled_masked_product_step_", "_compiled_product_step_"):
        monkeypatch.setattr(op, form, lambda *_, form=form: taken.append(form))
    weight, _, main = tensors((3, 4), torch.float32)

    def forms(tokens, ratio):
        taken.clear()
        with backend("cpp"):
            op.masked_sgd_product_(
                weight,
                torch.ones(tokens, 3),
                torch.ones(tokens, 4),
                main,
                **{**STEP, "ratio": ratio},
            )
        return taken

    fast = extension.masked_sgd_product_is_fast()
    masked = ["_compiled_masked_product_step_" if fast else "_compiled_product_step_"]
    assert forms(64, 0.2) == masked
    assert forms(63, 0.2) == ["_compiled_product_step_"]
    assert forms(64, 0.34) == ["_compiled_product_step_"]


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_thread_counts_give_the_same_bits_of_a_product(layout):
    weight, main = (lay_out(part, layout)[0] for part in tensors((301, 1023), torch.float32)[::2])
    output_grads, inputs = random_rows(500, 301, seed=8), random_rows(500, 1023, seed=9)
    with backend("cpp"):
        assert_same_bits_on_any_threads(
            lambda: op.masked_sgd_product_(weight.clone(), output_grads, inputs, main, **STEP)
        )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tokens", [2, 70])
def test_product_with_what_is_not_finite(name, tokens):
    """They reach their row or column, where the mask lets them through, and nothing else."""
    weight, _, main = tensors((40, 50), torch.float32)
    output_grads, inputs = torch.ones(tokens, 40), torch.ones(tokens, 50)
    output_grads[tokens - 1, 3] = torch.inf
    inputs[0, 7] = torch.nan
    step = {"seed": 5, "ratio": 0.3, "lr": 1.0}
    with backend(name):
        result = op.masked_sgd_product_(weight.clone(), output_grads, inputs, main, **step)
    mask = random_mask(5, 0.3, weight.shape)
    columns = torch.zeros_like(mask)
    columns[:, 7] = True
    rows = torch.zeros_like(mask)
    rows[3] = True
    assert torch.equal(result.isnan(), mask & columns)
    assert torch.equal(result.isinf(), mask & rows & ~columns)


@pytest.mark.parametrize("name", BACKENDS)
def test_product_of_no_tokens_and_inactive(name):
    weight, _, main = tensors((17, 33), torch.bfloat16)
    none = (torch.zeros(0, 17, dtype=torch.bfloat16), torch.zeros(0, 33, dtype=torch.bfloat16))
    some = (torch.ones(2, 17, dtype=torch.bfloat16), torch.ones(2, 33, dtype=torch.bfloat16))
    step = {**STEP, "ratio": 1.0, "weight_decay": 0.0, "norm_constraint": None}
    with backend(name):
        assert torch.equal(op.masked_sgd_product_(weight.clone(), *none, main, **step), weight)
        off = torch.tensor(False)
        still = op.masked_sgd_product_(weight.clone(), *some, main, **step, active=off)
    assert torch.equal(still, weight)


@needs_extension
def test_whoever_saved_the_weight_notices():
    weight, grad, main = tensors((17, 33), torch.float32)
    factor = torch.ones_like(weight, requires_grad=True)
    product = (factor * weight).sum()
    with backend("cpp"):
        op.masked_sgd_(weight, grad, main, **STEP)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_backend_on_the_cpu():
    expected = "torch" if extension is None else "cpp"
    assert explain("masked_sgd", op.CANDIDATES, torch.device("cpu")).backend == expected


@needs_extension
def test_cpp_says_what_it_does_not_take():
    weight, grad, main = tensors((3, 4), torch.float64)
    with backend("cpp"), pytest.raises(ValueError, match=r"not torch\.float64"):
        op.masked_sgd_(weight, grad, main, **STEP)
    shared = torch.zeros(1, 4).expand(3, 4)
    with backend("cpp"), pytest.raises(ValueError, match="weight has strides 0 and 1: its 3 x"):
        op.masked_sgd_(shared, grad.float(), main.float(), **STEP)


BAD_STEPS = [
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"ratio": 1.5}, ValueError, r"ratio must be in \[0, 1\], got 1.5"),
    ({"lr": -0.5}, ValueError, "lr is -0.5"),
    ({"lr": math.nan}, ValueError, "lr is nan"),
    ({"weight_decay": math.inf}, ValueError, "weight_decay is inf"),
    ({"norm_constraint": -1.0}, ValueError, "norm_constraint is -1.0"),
    ({"norm_constraint": math.nan}, ValueError, "norm_constraint is nan"),
    ({"active": torch.tensor(1)}, ValueError, "active is torch.int64"),
    ({"active": torch.ones(2, dtype=torch.bool)}, ValueError, r"active is torch.bool \(2,\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_STEPS)
def test_bad_steps(change, error, message):
    weight, grad, main = tensors((3, 4), torch.float32)
    before = weight.clone()
    with pytest.raises(error, match=message):
        op.masked_sgd_(weight, grad, main, **{**STEP, **change})
    assert torch.equal(weight, before)


def test_bad_tensors():
    weight, grad, main = tensors((3, 4), torch.float32)
    with pytest.raises(ValueError, match=r"grad \(4, 3\) and weight \(3, 4\) differ"):
        op.masked_sgd_(weight, grad.T, main, **STEP)
    with pytest.raises(ValueError, match=r"main is torch.bfloat16 \(3, 4\); weight is torch.float"):
        op.masked_sgd_(weight, grad, main.bfloat16(), **STEP)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2, 2\)"):
        op.masked_sgd_(weight.view(3, 2, 2), grad, main, **STEP)
    with pytest.raises(UnsupportedWeightError, match=r"weight has dtype torch\.int8"):
        op.masked_sgd_(weight.to(torch.int8), grad, main, **STEP)
    with pytest.raises(ValueError, match=r"do not give the gradient of a weight \(3, 4\)"):
        op.masked_sgd_product_(weight, torch.ones(2, 4), torch.ones(2, 4), main, **STEP)
    with pytest.raises(ValueError, match=r"output_grads is torch\.float32 and inputs"):
        op.masked_sgd_product_(weight, torch.ones(2, 3), torch.ones(2, 4).half(), main, **STEP)


def test_helpers_compare_bits():
    assert not torch.equal(bits(torch.tensor([0.0])), bits(torch.tensor([-0.0])))
