"""solve_shift: ``Δ = (Kᵀ K + λ I)⁻¹ Kᵀ V`` in two forms."""

from __future__ import annotations

import importlib
import itertools
import re

import pytest
import torch
from layouts import DTYPES, LAYOUTS, lay_out, random_rows, same_bits
from tolerances import assert_as_accurate, floor, largest_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pyeditfast import backend, reference
from pyeditfast.errors import NonFiniteError
from pyeditfast.ops import solve_shift

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.solve_shift")

# n, d_in, d_out: few rows and many, wide and narrow outputs.
SIZES = [
    (1, 1, 1),
    (1, 7, 5),
    (7, 1, 5),
    (13, 31, 17),
    (13, 17, 31),
    (61, 13, 7),
    (61, 7, 13),
    (37, 101, 53),
]


def exact_shift(keys: Tensor, values: Tensor, ridge: float = 1.0) -> Tensor:
    """Return ``Δᵀ`` by float64 singular values, a way that neither form takes."""
    u, s, v = torch.linalg.svd(keys.double(), full_matrices=False)
    filtered = (s / (s.square() + ridge)).unsqueeze(-2)
    return (values.double().mT @ u * filtered) @ v


def naive_shift(keys: Tensor, values: Tensor, ridge: float, form: str) -> Tensor:
    """Return ``Δᵀ`` from the formula of a form in plain float32."""
    keys, values = keys.float(), values.float()
    if form == "dual":
        return torch.linalg.solve(reference.gram(keys, ridge), values).mT @ keys
    return reference.solve_shift(keys, values, ridge).dense()


def relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", ["auto", "dual", "primal"])
def test_every_form_is_as_accurate_as_plain_float32(form, sizes, lead):
    n, d_in, d_out = sizes
    keys, values = random_rows(*lead, n, d_in), random_rows(*lead, n, d_out, seed=1)
    shift = solve_shift(keys, values, 0.5, form)
    assert shift.form == (op.choose_form(*sizes) if form == "auto" else form)
    assert shift.rank == (n if shift.form == "dual" else min(sizes))
    assert shift.shape == (*lead, d_out, d_in) and shift.device == keys.device
    naive = naive_shift(keys, values, 0.5, shift.form)
    assert_as_accurate(shift.dense(), naive, exact_shift(keys, values, 0.5), max(sizes))


@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_solved_as_float32_is(dtype, form):
    keys, values = random_rows(29, 53, dtype=dtype), random_rows(29, 31, seed=1, dtype=dtype)
    shift = solve_shift(keys, values, 1.0, form)
    naive = naive_shift(keys, values, 1.0, form)
    assert_as_accurate(shift.dense(), naive, exact_shift(keys, values), 53)


def test_keys_and_values_may_differ_in_dtype():
    keys, values = random_rows(9, 23, dtype=torch.bfloat16), random_rows(9, 17, seed=1)
    result = solve_shift(keys, values).dense()
    assert_as_accurate(
        result, naive_shift(keys, values, 1.0, "dual"), exact_shift(keys, values), 23
    )


@pytest.mark.parametrize(("d_in", "d_out"), [(3000, 512), (512, 3000)])
def test_a_whole_turn(d_in, d_out):
    keys, values = random_rows(400, d_in), random_rows(400, d_out, seed=1, scale=1e-6)
    shift = solve_shift(keys, values)
    assert shift.form == "dual"
    exact = exact_shift(keys, values)
    assert relative_error(shift.dense(), exact) <= 1e-6
    assert_as_accurate(shift.dense(), naive_shift(keys, values, 1.0, "dual"), exact, d_in)


@pytest.mark.parametrize("sizes", [(13, 31, 17), (61, 7, 13), (40, 41, 41)], ids=str)
def test_forms_and_reference_agree(sizes):
    n, d_in, d_out = sizes
    keys, values = random_rows(n, d_in), random_rows(n, d_out, seed=1)
    dual = solve_shift(keys, values, 10.0, "dual").dense().double()
    primal = solve_shift(keys, values, 10.0, "primal").dense().double()
    published = reference.solve_shift(keys.double(), values.double(), 10.0).dense()
    assert largest_error(published, exact_shift(keys, values, 10.0)) <= 1e-12
    assert largest_error(dual, published) <= 20 * floor(torch.float32, n)
    assert largest_error(primal, published) <= floor(torch.float32, 0)


@pytest.mark.parametrize("sizes", [(100, 600, 200), (37, 211, 53), (60, 101, 400)], ids=str)
@pytest.mark.parametrize(
    ("scale", "outlier"), [(1.0, 1e2), (1e4, 1e6)], ids=["keys of 1", "keys of 1e4"]
)
def test_a_dominant_direction_costs_float32_its_digits_and_not_the_op(sizes, scale, outlier):
    n, d_in, d_out = sizes
    direction = torch.nn.functional.normalize(random_rows(1, d_in, seed=2))
    strength = 1.0 + 0.1 * random_rows(n, 1, seed=3)
    keys = scale * random_rows(n, d_in) + outlier * strength * direction
    values = random_rows(n, d_out, seed=1, scale=1e-4)
    exact = exact_shift(keys, values)
    assert relative_error(solve_shift(keys, values).dense(), exact) <= 5e-6
    assert relative_error(naive_shift(keys, values, 1.0, "dual"), exact) > 5e-6
    assert relative_error(naive_shift(keys, values, 1.0, "primal"), exact) > 1e-3


@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiny_keys(dtype, form):
    keys, values = random_rows(13, 29, scale=1e-6, dtype=dtype), random_rows(13, 17, seed=1)
    exact = exact_shift(keys, values)
    naive = naive_shift(keys, values, 1.0, form)
    assert_as_accurate(solve_shift(keys, values, form=form).dense(), naive, exact, 29)


def test_keys_that_repeat():
    # Rank 3 and 12 rows: without the ridge the dual system is singular.
    keys = random_rows(3, 31).repeat(4, 1)
    values = random_rows(12, 7, seed=1)
    naive = naive_shift(keys, values, 1.0, "dual")
    result = solve_shift(keys, values, form="dual").dense()
    assert_as_accurate(result, naive, exact_shift(keys, values), 12)


@pytest.mark.parametrize("form", ["auto", "dual", "primal"])
@pytest.mark.parametrize(
    ("keys_shape", "d_out"), [((0, 7), 5), ((0, 3, 7), 5), ((2, 0, 7), 5), ((3, 7), 0), ((3, 0), 5)]
)
def test_empty_inputs(form, keys_shape, d_out):
    shift = solve_shift(torch.ones(keys_shape), torch.ones(*keys_shape[:-1], d_out), form=form)
    expected = torch.zeros(*keys_shape[:-2], d_out, keys_shape[-1])
    assert torch.equal(shift.dense(), expected)
    assert float(shift.largest_entry_bound()) == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype, form, layout):
    plain_keys = random_rows(3, 13, 29, dtype=dtype)
    plain_values = random_rows(3, 13, 7, seed=1, dtype=dtype)
    keys, keys_storage = lay_out(plain_keys, layout)
    values, values_storage = lay_out(plain_values, layout)
    before = keys_storage.clone(), values_storage.clone()
    result = solve_shift(keys, values, form=form).dense()
    naive = naive_shift(plain_keys, plain_values, 1.0, form)
    assert_as_accurate(result, naive, exact_shift(plain_keys, plain_values), 29)
    assert same_bits(keys_storage, before[0]) and same_bits(values_storage, before[1])


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_expanded_inputs(form):
    keys, values = random_rows(1, 13, 29), random_rows(2, 13, 1, seed=1)
    result = solve_shift(keys.expand(2, 13, 29), values.expand(2, 13, 7), form=form).dense()
    exact = exact_shift(keys.repeat(2, 1, 1), values.repeat(1, 1, 7))
    naive = naive_shift(keys.repeat(2, 1, 1), values.repeat(1, 1, 7), 1.0, form)
    assert_as_accurate(result, naive, exact, 29)


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_gives_the_same_bits_twice(form):
    keys, values = random_rows(2, 61, 127), random_rows(2, 61, 31, seed=1)
    first, second = (solve_shift(keys, values, form=form).dense() for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["auto", "dual", "primal"])
def test_reference_backend_is_the_published_formula_in_float64(form, dtype):
    keys = random_rows(2, 9, 17, dtype=dtype)
    values = random_rows(2, 9, 5, seed=1, dtype=dtype)
    with backend("reference"):
        shift = solve_shift(keys, values, 2.0, form)
    published = reference.solve_shift(keys.double(), values.double(), 2.0)
    assert torch.equal(shift.dense(), published.dense().float())
    assert (shift.form, shift.rank) == ("primal", 5)


def test_reference_is_the_solution_of_the_normal_equations():
    keys = random_rows(9, 4, dtype=torch.float64)
    values = random_rows(9, 3, seed=1, dtype=torch.float64)
    shift = reference.solve_shift(keys, values, 0.5)
    delta = shift.dense().mT
    left = keys.mT @ (keys @ delta) + 0.5 * delta
    assert torch.allclose(left, keys.mT @ values, rtol=0.0, atol=1e-13)


# Which form, and what it costs.


@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        ((400, 14336, 4096), "dual"),
        ((400, 4096, 14336), "dual"),
        ((1, 4096, 4096), "dual"),
        ((0, 8, 8), "dual"),
        ((100_000, 512, 2048), "primal"),
        ((20_000, 4096, 4096), "primal"),
        ((3, 1, 1), "primal"),
    ],
    ids=str,
)
def test_auto_takes_the_cheaper_form(sizes, form):
    assert op.choose_form(*sizes) == form
    cheaper = op.dual_flops if form == "dual" else op.primal_flops
    assert cheaper(*sizes) == min(op.dual_flops(*sizes), op.primal_flops(*sizes))


def test_auto_changes_its_mind_once_as_rows_are_added():
    forms = [op.choose_form(n, 64, 48) for n in range(1, 400)]
    assert forms[0] == "dual" and forms[-1] == "primal"
    assert sum(a != b for a, b in itertools.pairwise(forms)) == 1


@pytest.mark.parametrize(("n", "form"), [(5, "dual"), (200, "primal")])
def test_auto_gives_the_form_it_chose(n, form):
    keys, values = random_rows(n, 40), random_rows(n, 30, seed=1)
    auto, named = solve_shift(keys, values), solve_shift(keys, values, form=form)
    assert auto.form == form
    assert same_bits(auto.dense(), named.dense())


def test_dual_solves_for_the_side_with_fewer_columns():
    keys, values = random_rows(5, 17), random_rows(5, 11, seed=1)
    shift = solve_shift(keys, values, form="dual")
    assert torch.equal(shift.right, keys) and not torch.equal(shift.left, values)
    keys, values = random_rows(5, 11), random_rows(5, 17, seed=1)
    shift = solve_shift(keys, values, form="dual")
    assert torch.equal(shift.left, values) and not torch.equal(shift.right, keys)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor, in elements, that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def test_dual_makes_no_tensor_larger_than_its_inputs():
    keys, values = random_rows(8, 300), random_rows(8, 200, seed=1)
    with LargestTensor() as seen:
        shift = solve_shift(keys, values, form="dual")
        shift.largest_entry_bound()
    assert seen.numel == keys.numel()
    with LargestTensor() as seen:
        solve_shift(keys, values, form="primal")
    assert seen.numel == 300 * 300


def test_a_large_covariance_is_kept_in_float32(monkeypatch):
    keys, values = random_rows(300, 61), random_rows(300, 29, seed=1)
    exact = exact_shift(keys, values)
    in_float64 = solve_shift(keys, values, form="primal")
    monkeypatch.setattr(op, "FLOAT64_COVARIANCE_BYTES", 8 * 61 * 61 - 1)
    in_float32 = solve_shift(keys, values, form="primal")
    assert in_float32.dense().dtype == torch.float32
    assert largest_error(in_float64.dense(), exact) <= floor(torch.float32, 0)
    assert largest_error(in_float32.dense(), exact) > largest_error(in_float64.dense(), exact)
    naive = naive_shift(keys, values, 1.0, "primal")
    assert_as_accurate(in_float32.dense(), naive, exact, 300)


# What is refused.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_nan_or_infinity_is_refused(chosen, name, value):
    rows = {"keys": random_rows(2, 5, 7), "values": random_rows(2, 5, 3)}
    rows[name][1, 4, 2] = value
    shape = tuple(rows[name].shape)
    with (
        backend(chosen),
        pytest.raises(NonFiniteError, match=re.escape(f"{name} {shape} hold NaN or infinity")),
    ):
        solve_shift(rows["keys"], rows["values"])


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_keys_whose_squares_overflow_are_refused(form):
    keys = torch.full((3, 4), 1e200, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="item 0 of gram holds NaN or infinity"):
        solve_shift(keys, torch.ones(3, 2), form=form)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], torch.ones(1, 1)), TypeError, "keys is a list"),
        ((torch.ones(2, 3), None), TypeError, "values is a NoneType"),
        ((torch.ones(2, 3).int(), torch.ones(2, 3)), TypeError, "keys has dtype torch.int32"),
        ((torch.ones(2, 3), torch.ones(2, 3).bool()), TypeError, "values has dtype torch.bool"),
        ((torch.ones(3), torch.ones(3)), ValueError, "keys has shape (3,)"),
        (
            (torch.ones(2, 3), torch.ones(4, 5)),
            ValueError,
            "keys (2, 3) and values (4, 5) differ before their last dimension",
        ),
        (
            (torch.ones(6, 2, 3), torch.ones(2, 3)),
            ValueError,
            "keys (6, 2, 3) and values (2, 3) differ",
        ),
        (
            (torch.ones(2, 3), torch.ones(2, 3, device="meta")),
            ValueError,
            "keys is on cpu and values on meta",
        ),
        ((torch.ones(2, 3), torch.ones(2, 3), 0.0), ValueError, "ridge is 0"),
        ((torch.ones(2, 3), torch.ones(2, 3), -1.0), ValueError, "ridge is -1.0"),
        ((torch.ones(2, 3), torch.ones(2, 3), float("nan")), ValueError, "ridge is nan"),
        (
            (torch.ones(2, 3), torch.ones(2, 3), 1.0, "lu"),
            ValueError,
            "form is 'lu'; choose one of auto, dual, primal",
        ),
    ],
)
def test_errors_show_the_offending_value(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        solve_shift(*arguments)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("difference", [0.0, 1e-3, 1e-2])
def test_keys_that_almost_repeat_with_other_values(difference, scale):
    # Two answers to one prompt: the terms of the product cancel, and the rounding of the cheaper
    # factor would be all that stays.
    keys = random_rows(20, 301, scale=scale)
    keys = torch.cat([keys, keys + scale * difference * random_rows(20, 301, seed=2)])
    values = random_rows(40, 101, seed=1, scale=1e-6)
    shift = solve_shift(keys, values, form="dual")
    assert relative_error(shift.dense(), exact_shift(keys, values)) <= 5e-6


@pytest.mark.parametrize("sizes", [(100, 600, 200), (37, 211, 53)], ids=str)
def test_a_direction_ten_thousand_times_the_rest(sizes):
    n, d_in, d_out = sizes
    direction = torch.nn.functional.normalize(random_rows(1, d_in, seed=2))
    keys = random_rows(n, d_in) + 1e4 * (1.0 + 0.1 * random_rows(n, 1, seed=3)) * direction
    values = random_rows(n, d_out, seed=1, scale=1e-4)
    shift = solve_shift(keys, values, form="dual")
    assert relative_error(shift.dense(), exact_shift(keys, values)) <= 5e-6


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_dual_with_more_rows_than_features(scale):
    keys, values = random_rows(60, 50, scale=scale), random_rows(60, 40, seed=1)
    shift = solve_shift(keys, values, form="dual")
    assert relative_error(shift.dense(), exact_shift(keys, values)) <= 5e-6
