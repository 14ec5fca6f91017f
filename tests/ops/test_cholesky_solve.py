"""cholesky_solve: ``G⁻¹ B``, and what becomes of an item that has no factor."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from exact_solution import exact_solution
from layouts import LAYOUTS, lay_out, random_rows, same_bits
from tolerances import assert_as_accurate, largest_error

from pyeditfast import backend, reference
from pyeditfast.errors import NonFiniteError, NotPositiveDefiniteError
from pyeditfast.ops import cholesky_solve

FLOATS = [torch.float32, torch.float64]

# [..., n, m]
SHAPES = [(1, 1), (1, 5), (7, 1), (17, 13), (101, 3), (2, 13, 7), (2, 3, 5, 4), (400, 30)]

INDEFINITE = torch.tensor([[1.0, 2.0], [2.0, 1.0]])


def positive_definite(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Return ``[..., n, n]`` with eigenvalues between 1 and about 5."""
    rows = random_rows(*shape, shape[-1], seed=seed, dtype=torch.float64)
    identity = torch.eye(shape[-1], dtype=torch.float64)
    return (rows @ rows.mT / shape[-1] + identity).to(dtype)


def almost_singular_in_float32() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a float32 matrix that has a float64 factor but, by rounding, no float32 one, and its
    inverse in float64.

    The second pivot of ``[[a, ak], [ak, ak² + 1]]`` is 1, less than what rounding ``(ak / √a)²`` of
    1.6e7 to float32 may cost. One block is left to chance, all are not.
    """
    blocks, inverses = [], []
    for a in range(2, 60):
        k = int((1.6e7 / a) ** 0.5)
        blocks.append(torch.tensor([[a, a * k], [a * k, a * k * k + 1]]))
        inverses.append(torch.tensor([[k * k + 1 / a, -k], [-k, 1]], dtype=torch.float64))
    matrix = torch.block_diag(*blocks)
    assert torch.equal(matrix.float().long(), matrix)
    assert torch.linalg.cholesky_ex(matrix.float()).info.item() > 0
    return matrix.float(), torch.block_diag(*inverses)


def test_exact_solutions_are_exact():
    # Odd numbers, so that the right-hand side is exact too; float64 alone loses digits.
    rows = torch.randint(-3, 4, (2, 30, 30), generator=torch.Generator().manual_seed(0)).double()
    gram, solution = rows @ rows.mT + 60 * torch.eye(30), 2 * rows[..., :4] + 1
    assert torch.equal(exact_solution(gram, gram @ solution), solution)
    assert not torch.equal(torch.linalg.solve(gram, gram @ solution), solution)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_is_as_accurate_as_linalg_solve(dtype, shape):
    gram = positive_definite(*shape[:-1], dtype=dtype)
    rhs = random_rows(*shape, dtype=dtype, seed=1)
    result = cholesky_solve(gram, rhs)
    assert result.shape == rhs.shape
    exact = exact_solution(gram, rhs)
    assert_as_accurate(result, reference.cholesky_solve(gram, rhs), exact, shape[-2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_inputs(dtype, layout):
    plain_gram = positive_definite(3, 13, dtype=dtype)
    plain_rhs = random_rows(3, 13, 5, dtype=dtype, seed=1)
    gram, gram_storage = lay_out(plain_gram, layout)
    rhs, rhs_storage = lay_out(plain_rhs, layout)
    before = gram_storage.clone(), rhs_storage.clone()
    exact = exact_solution(plain_gram, plain_rhs)
    naive = reference.cholesky_solve(plain_gram, plain_rhs)
    assert_as_accurate(cholesky_solve(gram, rhs), naive, exact, 13)
    assert same_bits(gram_storage, before[0]) and same_bits(rhs_storage, before[1])


def test_one_expanded_gram_for_many_sides():
    gram = positive_definite(11)
    rhs = random_rows(4, 11, 3, seed=1)
    exact = exact_solution(gram.repeat(4, 1, 1), rhs)
    naive = reference.cholesky_solve(gram.repeat(4, 1, 1), rhs)
    assert_as_accurate(cholesky_solve(gram.expand(4, 11, 11), rhs), naive, exact, 11)


@pytest.mark.parametrize(
    "shape", [(0, 4), (5, 0), (0, 0), (0, 5, 3), (2, 0, 5, 3), (2, 0, 3), (3, 4, 0)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty_systems(dtype, shape):
    *lead, n, _ = shape
    gram = torch.eye(n, dtype=dtype).expand(*lead, n, n)
    result = cholesky_solve(gram, torch.zeros(shape, dtype=dtype))
    assert result.shape == shape and result.dtype == dtype


def test_result_of_an_empty_system_is_not_the_input():
    rhs = torch.zeros(0, 4)
    assert cholesky_solve(torch.zeros(0, 0), rhs) is not rhs


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_only_the_lower_triangle_is_read(dtype):
    gram, rhs = positive_definite(3, 17, dtype=dtype), random_rows(3, 17, 4, dtype=dtype)
    upper = torch.triu(torch.full((17, 17), float("nan"), dtype=dtype), 1)
    assert same_bits(cholesky_solve(torch.tril(gram) + upper, rhs), cholesky_solve(gram, rhs))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_magnitudes_cancel(scale):
    gram, rhs = positive_definite(2, 17), random_rows(2, 17, 4)
    exact = exact_solution(scale * gram, rhs)
    naive = reference.cholesky_solve(scale * gram, rhs)
    assert_as_accurate(cholesky_solve(scale * gram, rhs), naive, exact, 17)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gives_the_same_bits_twice(dtype):
    gram, rhs = positive_definite(2, 61, dtype=dtype), random_rows(2, 61, 7, dtype=dtype)
    assert same_bits(cholesky_solve(gram, rhs), cholesky_solve(gram, rhs))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reference_backend_is_the_float64_formula(dtype):
    gram, rhs = positive_definite(2, 17, dtype=dtype), random_rows(2, 17, 7, dtype=dtype)
    with backend("reference"):
        result = cholesky_solve(gram, rhs)
    assert torch.equal(result, torch.linalg.solve(gram.double(), rhs.double()).to(dtype))


def with_bad_item(bad: torch.Tensor, lead: tuple[int, ...], item: int):
    """Return a good batch, its right-hand sides, and the batch with one item replaced."""
    n = bad.shape[-1]
    good = positive_definite(*lead, n, dtype=bad.dtype)
    rhs = random_rows(*lead, n, 3, seed=1, dtype=bad.dtype)
    mixed = good.clone()
    mixed.view(-1, n, n)[item] = bad
    return good, rhs, mixed


@pytest.mark.parametrize(("lead", "item"), [((5,), 2), ((2, 3), 4), ((1,), 0), ((), 0)], ids=str)
def test_item_without_float32_factor_is_solved_in_float64(lead, item, caplog):
    bad, inverse = almost_singular_in_float32()
    good, rhs, mixed = with_bad_item(bad, lead, item)
    before = mixed.clone(), rhs.clone()
    with caplog.at_level(logging.WARNING):
        result = cholesky_solve(mixed, rhs)
    assert caplog.records == []
    n = bad.shape[-1]
    exact = inverse @ rhs.view(-1, n, 3)[item].double()
    # The condition number is about 1e14: in float32 not one digit would be right.
    assert largest_error(result.view(-1, n, 3)[item], exact) <= 2.0**-23
    undisturbed = cholesky_solve(good, rhs).view(-1, n, 3)
    for other in range(undisturbed.shape[0]):
        if other != item:
            assert torch.equal(result.view(-1, n, 3)[other], undisturbed[other])
    assert same_bits(mixed, before[0]) and same_bits(rhs, before[1])


@pytest.mark.parametrize(("lead", "item"), [((5,), 2), ((2, 3), 4), ((), 0)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_singular_item_is_repaired_and_the_others_are_untouched(dtype, lead, item, caplog):
    singular = torch.ones(6, 6, dtype=dtype)
    good, rhs, mixed = with_bad_item(singular, lead, item)
    # A right-hand side in the range of the matrix: without it the solution is of the order of 1e12.
    rhs.view(-1, 6, 3)[item] = torch.tensor([6.0, -12.0, 3.0], dtype=dtype)
    with caplog.at_level(logging.WARNING, logger="pyeditfast.ops.cholesky_solve"):
        result = cholesky_solve(mixed, rhs).view(-1, 6, 3)
    # The mean diagonal is 1, so the first jitter is 1e-12 itself.
    assert caplog.messages == [
        f"item {item} of gram is not positive definite; 1e-12 was added to its diagonal"
    ]
    assert caplog.records[0].levelno == logging.WARNING
    repaired = result[item].double()
    residual = repaired.sum(0) - torch.tensor([6.0, -12.0, 3.0]).double()
    assert residual.abs().max() <= 1e-5
    undisturbed = cholesky_solve(good, rhs).view(-1, 6, 3)
    for other in range(undisturbed.shape[0]):
        if other != item:
            assert torch.equal(result[other], undisturbed[other])


def test_jitter_grows_until_a_factor_exists(caplog):
    # The mean diagonal is 100, the smallest eigenvalue -1e-9 of it: of the jitters 1e-12, 1e-10
    # and 1e-8 only the last helps.
    gram = torch.diag(torch.tensor([200.0, 200.0, -1e-7, 0.0], dtype=torch.float64))
    with caplog.at_level(logging.WARNING):
        result = cholesky_solve(gram, torch.ones(4, 1, dtype=torch.float64))
    assert caplog.messages == [
        "item 0 of gram is not positive definite; 1e-06 was added to its diagonal"
    ]
    diagonal = gram.diagonal()
    expected = 1.0 / (diagonal + 1e-8 * diagonal.mean())
    assert torch.allclose(result[:, 0], expected, rtol=1e-12, atol=0.0)


def test_a_good_batch_logs_nothing(caplog):
    with caplog.at_level(logging.DEBUG, logger="pyeditfast.ops.cholesky_solve"):
        cholesky_solve(positive_definite(3, 7), random_rows(3, 7, 2))
    assert caplog.records == []


@pytest.mark.parametrize(("lead", "item"), [((5,), 3), ((2, 3), 4), ((), 0)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_indefinite_item_is_named(dtype, lead, item):
    _, rhs, mixed = with_bad_item(INDEFINITE.to(dtype), lead, item)
    before = mixed.clone(), rhs.clone()
    message = (
        f"item {item} of gram (2, 2) is not positive definite (pivot 2), "
        "not even in float64 with 1e-08 added to its diagonal"
    )
    with pytest.raises(NotPositiveDefiniteError, match=re.escape(message)):
        cholesky_solve(mixed, rhs)
    assert same_bits(mixed, before[0]) and same_bits(rhs, before[1])


def test_negative_definite_is_refused():
    with pytest.raises(NotPositiveDefiniteError, match=re.escape("item 0 of gram (3, 3)")):
        cholesky_solve(-torch.eye(3), torch.ones(3, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, 2), (4, 4), (2, 1), (4, 0), (4, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_or_infinity_is_named(dtype, place, value):
    # An infinite last pivot passes LAPACK: its factor is infinite and its info 0.
    gram = positive_definite(3, 5, dtype=dtype)
    gram[1, place[0], place[1]] = value
    with pytest.raises(NonFiniteError, match=re.escape("item 1 of gram holds NaN or infinity")):
        cholesky_solve(gram, torch.ones(3, 5, 2, dtype=dtype))


def test_errors_belong_to_one_family():
    assert issubclass(NonFiniteError, ArithmeticError)
    assert issubclass(NotPositiveDefiniteError, ArithmeticError)


@pytest.mark.parametrize(
    ("gram", "rhs", "error", "message"),
    [
        ([[1.0]], torch.ones(1, 1), TypeError, "gram is a list"),
        (torch.eye(2), None, TypeError, "rhs is a NoneType"),
        (torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 1), TypeError, "torch.int64"),
        (torch.ones(2, 3), torch.ones(2, 1), ValueError, "gram has shape (2, 3); [..., n, n]"),
        (torch.eye(2), torch.ones(2), ValueError, "rhs has shape (2,)"),
        (
            torch.eye(2).half(),
            torch.ones(2, 1).half(),
            TypeError,
            "gram has dtype torch.float16 and rhs torch.float16",
        ),
        (
            torch.eye(2),
            torch.ones(2, 1).double(),
            TypeError,
            "gram has dtype torch.float32 and rhs torch.float64",
        ),
        (torch.eye(2), torch.ones(3, 1), ValueError, "gram (2, 2) and rhs (3, 1) do not match"),
        (
            torch.eye(2).expand(3, 2, 2),
            torch.ones(2, 1),
            ValueError,
            "gram (3, 2, 2) and rhs (2, 1) do not match",
        ),
        (
            torch.eye(2),
            torch.ones(2, 1, device="meta"),
            ValueError,
            "gram is on cpu and rhs on meta",
        ),
    ],
)
def test_errors_show_the_offending_value(gram, rhs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        cholesky_solve(gram, rhs)
