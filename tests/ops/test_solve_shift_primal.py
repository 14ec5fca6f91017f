"""The primal form of solve_shift: module by module, block by block, and what has no factor."""

from __future__ import annotations

import importlib
import logging
import re

import pytest
import torch
from layouts import DTYPES, LAYOUTS, lay_out, random_rows, same_bits
from tolerances import assert_as_accurate, largest_error
from torch import Tensor

from pyeditfast import reference
from pyeditfast.errors import NonFiniteError, NotPositiveDefiniteError
from pyeditfast.ops import precision, solve_shift

# The package exports the functions under the same names as their modules.
op = importlib.import_module("pyeditfast.ops.solve_shift")
cholesky = importlib.import_module("pyeditfast.ops.cholesky_solve")

LEADS = [((), 0), ((5,), 2), ((2, 3), 4)]
"""Leading dimensions, and an item."""

SYSTEMS = [torch.float32, torch.float64]


@pytest.fixture
def float32_system(monkeypatch) -> None:
    """Keep every covariance in float32, as a large one is."""
    monkeypatch.setattr(op, "FLOAT64_COVARIANCE_BYTES", 0)


@pytest.fixture(params=SYSTEMS, ids=str)
def system(request, monkeypatch) -> torch.dtype:
    """Run with the covariance in either dtype."""
    if request.param == torch.float32:
        monkeypatch.setattr(op, "FLOAT64_COVARIANCE_BYTES", 0)
    return request.param


def exact_shift(keys: Tensor, values: Tensor, ridge: float = 1.0) -> Tensor:
    return reference.solve_shift(keys.double(), values.double(), ridge).dense()


def primal(keys: Tensor, values: Tensor, ridge: float = 1.0) -> Tensor:
    shift = solve_shift(keys, values, ridge, "primal")
    assert shift.form == "primal" and shift.matrix is not None
    return shift.matrix


@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3)], ids=str)
def test_every_module_gets_its_own_shift(lead, system):
    keys, values = random_rows(*lead, 37, 17), random_rows(*lead, 37, 11, seed=1)
    result = primal(keys, values)
    assert result.shape == (*lead, 11, 17) and result.dtype == torch.float32
    assert result.is_contiguous()
    alone = [
        primal(some_keys, some_values)
        for some_keys, some_values in zip(
            keys.reshape(-1, 37, 17), values.reshape(-1, 37, 11), strict=True
        )
    ]
    assert same_bits(result.reshape(-1, 11, 17), torch.stack(alone))
    naive = reference.solve_shift(keys, values, 1.0).dense()
    assert_as_accurate(result, naive, exact_shift(keys, values), 37)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1, 200, 1000])
def test_blocks_of_rows_and_columns(elements, dtype, layout, system, monkeypatch):
    monkeypatch.setattr(precision, "BLOCK_ELEMENTS", elements)
    plain_keys = random_rows(2, 101, 31, dtype=dtype)
    plain_values = random_rows(2, 101, 29, seed=1, dtype=dtype)
    keys, keys_storage = lay_out(plain_keys, layout)
    values, values_storage = lay_out(plain_values, layout)
    before = keys_storage.clone(), values_storage.clone()
    naive = reference.solve_shift(plain_keys.float(), plain_values.float(), 1.0).dense()
    exact = exact_shift(plain_keys, plain_values)
    assert_as_accurate(primal(keys, values), naive, exact, 101)
    assert same_bits(keys_storage, before[0]) and same_bits(values_storage, before[1])


def test_keys_and_values_of_different_dtypes(system, monkeypatch):
    monkeypatch.setattr(precision, "BLOCK_ELEMENTS", 200)
    keys, values = random_rows(101, 31), random_rows(101, 29, seed=1, dtype=torch.bfloat16)
    naive = reference.solve_shift(keys, values.float(), 1.0).dense()
    assert_as_accurate(primal(keys, values), naive, exact_shift(keys, values), 101)


def with_singular_item(lead: tuple[int, ...], item: int) -> tuple[Tensor, Tensor]:
    """Return keys of which those of one item are equal, and small values.

    A ridge of 1e-30 vanishes beside them, so that ``Kᵀ K + λ I`` of that item is singular.
    """
    keys, values = random_rows(*lead, 16, 4), random_rows(*lead, 16, 3, seed=1)
    keys.view(-1, 16, 4)[item] = 1.0
    return keys, values


@pytest.mark.parametrize(("lead", "item"), LEADS, ids=str)
def test_a_repaired_module_is_named_and_the_others_are_as_they_were(lead, item, system, caplog):
    keys, values = with_singular_item(lead, item)
    before = keys.clone(), values.clone()
    with caplog.at_level(logging.WARNING):
        result = primal(keys, values, 1e-30).view(-1, 3, 4)
    # The mean diagonal is 16.
    assert caplog.messages == [
        f"item {item} of gram is not positive definite; 1.6e-11 was added to its diagonal"
    ]
    fitted = result[item].sum(-1)
    assert torch.allclose(fitted, values.view(-1, 16, 3)[item].mean(0), atol=1e-3)
    for other in range(result.shape[0]):
        if other != item:
            alone = primal(keys.view(-1, 16, 4)[other], values.view(-1, 16, 3)[other], 1e-30)
            assert torch.equal(result[other], alone)
    assert same_bits(keys, before[0]) and same_bits(values, before[1])


@pytest.mark.parametrize(("lead", "item"), LEADS, ids=str)
def test_a_module_without_a_factor_is_named(lead, item, system, monkeypatch):
    monkeypatch.setattr(cholesky, "JITTERS", (0.0,))
    keys, values = with_singular_item(lead, item)
    before = keys.clone(), values.clone()
    message = (
        f"item {item} of gram (4, 4) is not positive definite (pivot 2), "
        "not even in float64 with 0 added to its diagonal"
    )
    with pytest.raises(NotPositiveDefiniteError, match=re.escape(message)):
        primal(keys, values, 1e-30)
    assert same_bits(keys, before[0]) and same_bits(values, before[1])


# With one feature an infinite square is the last pivot, which LAPACK takes for a good one.
@pytest.mark.parametrize("d_in", [1, 4])
@pytest.mark.parametrize(("lead", "item"), LEADS, ids=str)
def test_a_module_whose_squares_overflow_is_named(lead, item, d_in, system):
    keys, values = random_rows(*lead, 9, d_in, dtype=torch.float64), torch.ones(*lead, 9, 3)
    keys.view(-1, 9, d_in)[item] *= 1e200
    message = f"item {item} of gram holds NaN or infinity"
    with pytest.raises(NonFiniteError, match=re.escape(message)):
        primal(keys, values)


@pytest.mark.parametrize(("lead", "item"), LEADS, ids=str)
def test_a_module_without_float32_factor_is_solved_in_float64(lead, item, float32_system, caplog):
    n, d_in = 60, 41
    keys, values = random_rows(*lead, n, d_in), random_rows(*lead, n, 13, seed=1)
    strong = 3e3 * (1.0 + 0.1 * random_rows(n, 1, seed=3)) * random_rows(1, d_in, seed=2)
    keys.view(-1, n, d_in)[item] += strong
    normal = keys.mT @ keys + torch.eye(d_in)
    failing = torch.linalg.cholesky_ex(normal).info.view(-1) > 0
    assert failing.nonzero().flatten().tolist() == [item]
    with caplog.at_level(logging.WARNING):
        result = primal(keys, values).view(-1, 13, d_in)
    assert caplog.records == []
    # The covariance is formed in float64 as well: from a float32 one no digit would be right.
    exact = exact_shift(keys, values).view(-1, 13, d_in)
    assert largest_error(result[item], exact[item]) <= 1e-6
    rounded = torch.linalg.solve(normal.double(), keys.double().mT @ values.double()).mT
    assert largest_error(rounded.reshape(-1, 13, d_in)[item], exact[item]) > 1e-3


def test_squares_that_overflow_float32_are_taken_in_float64(float32_system):
    keys, values = random_rows(19, 7, scale=1e25), random_rows(19, 5, seed=1, scale=1e20)
    exact = exact_shift(keys, values, 1e45)
    assert largest_error(primal(keys, values, 1e45), exact) <= 2.0**-23


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_a_shift_is_a_constant_to_autograd(form):
    keys, values = random_rows(9, 5).requires_grad_(), random_rows(9, 3, seed=1).requires_grad_()
    shift = solve_shift(keys, values, form=form).dense()
    assert not shift.requires_grad
    assert same_bits(shift, solve_shift(keys.detach(), values.detach(), form=form).dense())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_or_infinity_is_found_in_every_dtype_and_layout(dtype, layout, value):
    plain = random_rows(2, 5, 7, dtype=dtype)
    # What lies between the rows of a view is NaN, and not theirs.
    rows, _ = lay_out(plain, layout)
    solve_shift(rows, torch.ones(2, 5, 3))
    plain[1, 4, 2] = value
    rows, _ = lay_out(plain, layout)
    with pytest.raises(NonFiniteError, match=re.escape("keys (2, 5, 7) hold NaN or infinity")):
        solve_shift(rows, torch.ones(2, 5, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_largest_numbers_are_finite(dtype):
    keys = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    for form in ("dual", "primal"):
        assert bool(solve_shift(keys, torch.ones(3, 2), form=form).dense().isfinite().all())
