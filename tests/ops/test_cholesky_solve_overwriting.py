"""cholesky_solve with ``overwrite_gram``: the factor takes the place of the matrix."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from allocations import peak_allocation
from exact_solution import exact_solution
from layouts import LAYOUTS, lay_out, random_rows, same_bits
from tolerances import assert_as_accurate
from torch import Tensor

from pyeditfast import backend, reference
from pyeditfast.errors import NonFiniteError, NotPositiveDefiniteError
from pyeditfast.ops import cholesky_solve

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.cholesky_solve")

FLOATS = [torch.float32, torch.float64]

LEADS = [((5,), 2), ((2, 3), 4), ((1,), 0), ((), 0)]


def positive_definite(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``[..., n, n]`` with eigenvalues between 1 and about 5."""
    rows = random_rows(*shape, shape[-1], dtype=torch.float64)
    return (rows @ rows.mT / shape[-1] + torch.eye(shape[-1], dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 5), (7, 1), (17, 13), (101, 3), (2, 13, 7), (2, 3, 5, 4)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_is_as_accurate_as_linalg_solve(dtype, shape):
    gram = positive_definite(*shape[:-1], dtype=dtype)
    rhs, overwritten = random_rows(*shape, dtype=dtype, seed=1), gram.clone()
    before = rhs.clone()
    result = cholesky_solve(overwritten, rhs, overwrite_gram=True)
    exact = exact_solution(gram, rhs)
    assert_as_accurate(result, reference.cholesky_solve(gram, rhs), exact, shape[-2])
    assert same_bits(rhs, before)
    if shape[-2] > 1:
        assert not torch.equal(overwritten, gram)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_right_hand_sides_of_any_layout(dtype, layout):
    gram, plain = positive_definite(3, 13, dtype=dtype), random_rows(3, 13, 5, dtype=dtype, seed=1)
    rhs, storage = lay_out(plain, layout)
    before = storage.clone()
    result = cholesky_solve(gram.clone(), rhs, overwrite_gram=True)
    exact = exact_solution(gram, plain)
    assert_as_accurate(result, reference.cholesky_solve(gram, plain), exact, 13)
    assert same_bits(storage, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_right_hand_sides_that_are_parts_of_the_matrices(dtype):
    gram = positive_definite(3, 13, dtype=dtype)
    expected = cholesky_solve(gram.clone(), gram[..., :4].clone(), overwrite_gram=True)
    assert same_bits(cholesky_solve(gram, gram[..., :4], overwrite_gram=True), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_lies_around_the_matrices_stays(dtype):
    around = torch.full((5, 7, 7), float("nan"), dtype=dtype)
    around[1:4] = positive_definite(3, 7, dtype=dtype)
    before = around.clone()
    cholesky_solve(around[1:4], random_rows(3, 7, 2, dtype=dtype), overwrite_gram=True)
    assert same_bits(around[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("strip", [1, 3, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_only_the_lower_triangle_is_read(dtype, strip, monkeypatch):
    monkeypatch.setattr(op, "STRIP", strip)
    gram, rhs = positive_definite(3, 17, dtype=dtype), random_rows(3, 17, 4, dtype=dtype)
    upper = torch.triu(torch.full((17, 17), float("nan"), dtype=dtype), 1)
    result = cholesky_solve(torch.tril(gram) + upper, rhs, overwrite_gram=True)
    assert same_bits(result, cholesky_solve(gram, rhs, overwrite_gram=True))


@pytest.mark.parametrize(
    "shape", [(0, 4), (5, 0), (0, 0), (0, 5, 3), (2, 0, 5, 3), (2, 0, 3), (3, 4, 0)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty_systems(dtype, shape):
    *lead, n, _ = shape
    gram, rhs = torch.eye(n, dtype=dtype).repeat(*lead, 1, 1), torch.zeros(shape, dtype=dtype)
    result = cholesky_solve(gram, rhs, overwrite_gram=True)
    assert result.shape == shape and result.dtype == dtype and result is not rhs


def test_one_by_one_views_of_odd_strides():
    gram = torch.full((6, 9), 4.0)[1:6:4, 2:3].unsqueeze(-1)[:1]
    assert gram.is_contiguous()
    assert cholesky_solve(gram, torch.full((1, 1, 1), 2.0), overwrite_gram=True).item() == 0.5


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
def test_matrices_that_are_not_contiguous_are_refused(layout):
    gram, storage = lay_out(positive_definite(3, 5), layout)
    before = storage.clone()
    message = f"gram (3, 5, 5) has strides {gram.stride()}; overwrite_gram needs a contiguous one"
    with pytest.raises(ValueError, match=re.escape(message)):
        cholesky_solve(gram, torch.ones(3, 5, 1), overwrite_gram=True)
    assert same_bits(storage, before)


def test_an_expanded_matrix_is_refused():
    with pytest.raises(ValueError, match=re.escape("strides (0, 5, 1)")):
        cholesky_solve(torch.eye(5).expand(3, 5, 5), torch.ones(3, 5, 1), overwrite_gram=True)


@pytest.mark.parametrize("name", ["gram", "rhs"])
def test_gradients_are_refused(name):
    inputs = {"gram": torch.eye(5), "rhs": torch.ones(5, 1)}
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=re.escape(f"{name} requires a gradient")):
        cholesky_solve(inputs["gram"], inputs["rhs"], overwrite_gram=True)
    with torch.no_grad():
        result = cholesky_solve(inputs["gram"], inputs["rhs"], overwrite_gram=True)
    assert torch.equal(result, torch.ones(5, 1))


def test_overwriting_has_to_be_named():
    with pytest.raises(TypeError, match="positional"):
        cholesky_solve(torch.eye(2), torch.ones(2, 1), True)


@pytest.mark.parametrize(("lead", "item"), LEADS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_indefinite_item_is_named(dtype, lead, item):
    gram = positive_definite(*lead, 3, dtype=dtype)
    gram.view(-1, 3, 3)[item] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
    rhs = random_rows(*lead, 3, 2, dtype=dtype)
    before = rhs.clone()
    message = (
        f"item {item} of gram (3, 3) is not positive definite (pivot 3); "
        "overwritten, it cannot be tried in float64"
    )
    with pytest.raises(NotPositiveDefiniteError, match=re.escape(message)):
        cholesky_solve(gram, rhs, overwrite_gram=True)
    assert same_bits(rhs, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, 2), (4, 4), (2, 1), (4, 0), (4, 3)], ids=str)
@pytest.mark.parametrize("strip", [1, 2, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_or_infinity_is_named(dtype, strip, place, value, monkeypatch):
    monkeypatch.setattr(op, "STRIP", strip)
    gram = positive_definite(3, 5, dtype=dtype)
    gram[1, place[0], place[1]] = value
    with pytest.raises(NonFiniteError, match=re.escape("item 1 of gram holds NaN or infinity")):
        cholesky_solve(gram, torch.ones(3, 5, 2, dtype=dtype), overwrite_gram=True)


def test_a_factor_that_overflows_is_no_factor():
    # The square of 1e30 is infinite in float32, and its row of the factor NaN.
    gram = torch.tensor([[1.0, 0.0], [1e30, 1.0]])
    with pytest.raises(NotPositiveDefiniteError, match=re.escape("item 0 of gram (2, 2)")):
        cholesky_solve(gram, torch.ones(2, 1), overwrite_gram=True)


def test_reference_backend_overwrites_nothing():
    gram, rhs = positive_definite(2, 5), random_rows(2, 5, 3)
    before = gram.clone()
    with backend("reference"):
        result = cholesky_solve(gram, rhs, overwrite_gram=True)
        assert same_bits(result, cholesky_solve(gram, rhs))
    assert same_bits(gram, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_second_matrix_exists(dtype):
    n = 2048
    gram = torch.eye(n, dtype=dtype).add_(1.0 / n).repeat(2, 1, 1)
    rhs = random_rows(2, n, 16, dtype=dtype)
    matrix, result = dtype.itemsize * n * n, dtype.itemsize * rhs.numel()
    overwriting = peak_allocation(lambda: cholesky_solve(gram, rhs, overwrite_gram=True))
    # A strip of 256 rows is an eighth of this matrix.
    assert overwriting - result <= 0.15 * matrix
    assert peak_allocation(lambda: cholesky_solve(gram, rhs)) >= 2 * matrix


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_repairing_an_item_holds_one_matrix_in_float64(dtype):
    n = 1024
    gram, rhs = torch.ones(n, n, dtype=dtype), torch.ones(n, 1, dtype=dtype)
    peak = peak_allocation(lambda: cholesky_solve(gram, rhs))
    # The factor that failed, and the float64 one.
    assert peak <= (dtype.itemsize + 8) * n * n + (1 << 20)
