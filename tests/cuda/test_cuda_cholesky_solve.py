"""The CUDA kernels of cholesky_solve, emulated: solutions, failing pivots, what is left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, lay_out, random_rows, same_bits
from ops.tolerances import UNIT_ROUNDOFF, assert_as_accurate

from pyeditfast.ops.cholesky_on_cuda import solve_on_cuda

pytestmark = pytest.mark.usefixtures("cuda")

FLOATS = (torch.float32, torch.float64)
# Around the sides of quads (4), slabs (16), narrow blocks (16 columns) and tiles (64).
ROWS = (1, 2, 3, 17, 63, 64, 65, 127, 128, 130, 200, 257)
COLUMNS = (1, 3, 16, 63, 64, 65, 130)
ITEMS = (1, 2, 3, 5)


def integers(*shape, most, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).double()


def exact_systems(items, n, columns, dtype, seed=0):
    """Return well-conditioned Gram matrices, right-hand sides and exact solutions: integers."""
    keys = integers(items, n, 2 * n + 1, most=3, seed=seed)
    # The mean square of a key is 4.
    gram = keys @ keys.mT + 4 * (2 * n + 1) * torch.eye(n, dtype=torch.float64)
    solution = integers(items, n, columns, most=4, seed=seed + 1)
    rhs = gram @ solution
    assert rhs.numel() == 0 or rhs.abs().max() < 2**24
    return gram.to(dtype), rhs.to(dtype), solution


def systems(items, n, columns, dtype, seed=0):
    """Return well-conditioned systems of any numbers."""
    keys = random_rows(items, n, 2 * n, seed=seed, dtype=torch.float64)
    gram = keys @ keys.mT / n + torch.eye(n, dtype=torch.float64)
    return gram.to(dtype), random_rows(items, n, columns, seed=seed + 1, dtype=dtype)


def assert_solved(gram, rhs, exact):
    solution, info = solve_on_cuda(gram, rhs)
    assert info.dtype == torch.int32 and info.shape == gram.shape[:-2] and not info.any()
    assert solution.shape == rhs.shape
    by_torch = torch.cholesky_solve(rhs, torch.linalg.cholesky(gram))
    assert_as_accurate(solution, by_torch, exact, rhs.shape[-2])


# Solutions.


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_size(dtype, n):
    for number, columns in enumerate(COLUMNS):
        items = ITEMS[(number + ROWS.index(n)) % len(ITEMS)] if n < 127 else 1 + number % 2
        assert_solved(*exact_systems(items, n, columns, dtype, seed=number))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_tiles(dtype):
    assert_solved(*exact_systems(1, 385, 5, dtype))


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 140),
    columns=st.integers(1, 80),
    items=st.integers(1, 3),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape(n, columns, items, dtype, seed):
    assert_solved(*exact_systems(items, n, columns, dtype, seed))


def ill_conditioned(kind: str, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    identity = torch.eye(n, dtype=torch.float64)
    rotation = torch.linalg.qr(normal(n, n)).Q
    graded = torch.logspace(0, 3, n, dtype=torch.float64)
    if kind == "eigenvalues from 1 to 1e6":
        return (rotation * graded.square()) @ rotation.T
    if kind == "half of the eigenvalues 1, half 1e6":
        return (rotation * torch.where(torch.arange(n) < n // 2, 1.0, 1e6)) @ rotation.T
    if kind == "one outlier direction":
        return identity + 1e6 * torch.outer(rotation[0], rotation[0])
    if kind == "keys with an outlier feature":
        keys = normal(n, 2 * n)
        keys[:, 7] *= 300.0
        return keys @ keys.T + identity
    if kind == "pairs of almost equal keys":
        keys = normal(n, 4 * n)
        keys[1::2] = keys[::2] + 0.01 * keys[1::2]
        return keys @ keys.T + identity
    if kind == "fewer features than keys":
        keys = normal(n, n // 4)
        return 10.0 * keys @ keys.T + identity
    if kind == "a diagonal block like Hilbert's":
        place = torch.arange(64, dtype=torch.float64)
        hilbert = 1.0 / (place[:, None] + place + 1.0) + 1e-6 * identity[:64, :64]
        return torch.block_diag(hilbert, identity[64:, 64:])
    mixed = identity + 0.3 / math.sqrt(n) * normal(n, n)
    rows = {"growing rows": graded, "shrinking rows": graded.flip(0)}[kind][:, None] * mixed
    return rows @ rows.T


def residual(gram, solution, rhs):
    """Return ``‖G x − b‖ / (‖G‖ ‖x‖)`` over all columns, computed in more than float64."""
    g, x, b = (tensor.numpy().astype(np.longdouble) for tensor in (gram, solution, rhs))
    norms = np.linalg.norm(gram.double().numpy(), 2) * np.sqrt((x * x).sum(0))
    return float(np.sqrt((((g @ x - b) ** 2).sum(0) / norms**2).mean()))


@pytest.mark.parametrize(
    "kind",
    [
        "eigenvalues from 1 to 1e6",
        "half of the eigenvalues 1, half 1e6",
        "one outlier direction",
        "keys with an outlier feature",
        "pairs of almost equal keys",
        "fewer features than keys",
        "a diagonal block like Hilbert's",
        "growing rows",
        "shrinking rows",
    ],
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_residuals_are_as_small_as_those_of_lapack(dtype, kind):
    exact = ill_conditioned(kind, 130)
    vectors = torch.linalg.eigh(exact).eigenvectors
    gram = exact.to(dtype)
    random = random_rows(130, 8, dtype=torch.float64)
    for sides in (random, exact @ random, exact @ vectors[:, -8:], exact @ vectors[:, :8]):
        rhs = sides.to(dtype)
        solution, info = solve_on_cuda(gram, rhs)
        by_lapack = torch.cholesky_solve(rhs, torch.linalg.cholesky(gram))
        assert info == 0
        found, allowed = residual(gram, solution, rhs), residual(gram, by_lapack, rhs)
        assert found <= 2.0 * allowed + UNIT_ROUNDOFF[dtype], (found, allowed)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_magnitudes_cancel(scale):
    gram, rhs, solution = exact_systems(2, 70, 5, torch.float32)
    power = 2.0 ** round(math.log2(scale))
    assert same_bits(solve_on_cuda(power * gram, power * rhs)[0], solve_on_cuda(gram, rhs)[0])
    assert_solved(power * gram, power * rhs, solution)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_layout(dtype, layout):
    plain_gram, plain_rhs = systems(3, 66, 20, dtype)
    gram, gram_storage = lay_out(plain_gram, layout)
    rhs, rhs_storage = lay_out(plain_rhs, layout)
    before = gram_storage.clone(), rhs_storage.clone()
    assert same_bits(solve_on_cuda(gram, rhs)[0], solve_on_cuda(plain_gram, plain_rhs)[0])
    assert same_bits(gram_storage, before[0]) and same_bits(rhs_storage, before[1])


def test_several_leading_dimensions_and_one_expanded_gram():
    gram, rhs = systems(1, 17, 18, torch.float32)
    sides = rhs.reshape(17, 2, 3, 3).permute(1, 2, 0, 3)
    solution, info = solve_on_cuda(gram.expand(2, 3, 17, 17), sides)
    assert info.shape == (2, 3) and solution.shape == (2, 3, 17, 3)
    whole = solve_on_cuda(gram[0], rhs[0])[0]
    assert same_bits(solution, whole.reshape(17, 2, 3, 3).permute(1, 2, 0, 3))


def test_a_second_matrix_can_be_spared():
    gram, rhs = systems(2, 66, 3, torch.float32)
    before = gram.clone()
    expected, _ = solve_on_cuda(gram, rhs)
    assert same_bits(gram, before)
    assert same_bits(solve_on_cuda(gram, rhs, overwrite_gram=True)[0], expected)
    assert not torch.equal(gram, before)


@pytest.mark.parametrize(
    "shape", [(0, 4), (5, 0), (0, 0), (0, 5, 3), (2, 0, 3), (3, 4, 0)], ids=str
)
def test_nothing_to_solve_for(shape):
    *lead, n, _ = shape
    solution, info = solve_on_cuda(torch.eye(n).expand(*lead, n, n), torch.zeros(shape))
    assert solution.shape == shape and info.shape == tuple(lead) and not info.any()


# Bits.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_order_of_blocks_does_not_matter(dtype, block_order, monkeypatch):
    gram, rhs = systems(2, 200, 70, dtype)
    gram[1, 150, 150] = -1.0
    in_some_order = solve_on_cuda(gram, rhs)
    monkeypatch.setenv("PYEDITFAST_BLOCK_ORDER", "0")
    in_order = solve_on_cuda(gram, rhs)
    assert all(same_bits(*pair) for pair in zip(in_some_order, in_order, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_neither_other_items_nor_other_columns_matter(dtype):
    gram, rhs = systems(3, 130, 66, dtype)
    whole, _ = solve_on_cuda(gram, rhs)
    assert same_bits(whole, solve_on_cuda(gram, rhs)[0])
    for item in range(3):
        assert same_bits(whole[item], solve_on_cuda(gram[item], rhs[item])[0])
    # Wide blocks on memory at and off multiples of 16 bytes, narrow ones, and a single column.
    for columns in (slice(0, 64), slice(1, 66), slice(2, 18), slice(65, 66)):
        assert same_bits(whole[..., columns], solve_on_cuda(gram, rhs[..., columns])[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_above_the_diagonal_does_not_matter(dtype):
    gram, rhs = systems(2, 130, 17, dtype)
    poison = torch.triu(torch.full((130, 130), math.nan, dtype=dtype), 1)
    solution, info = solve_on_cuda(torch.tril(gram) + poison, rhs)
    assert same_bits(solution, solve_on_cuda(gram, rhs)[0]) and not info.any()


# Failing pivots.

PIVOTS = (0, 1, 3, 4, 17, 62, 63, 64, 65, 100, 127, 128, 129)


def with_failing_pivots(pivots, dtype):
    """Return systems of 130 of which item i fails at ``pivots[i]``, or not where that is None."""
    gram, rhs = systems(len(pivots), 130, 3, dtype)
    for item, pivot in enumerate(pivots):
        if pivot is not None:
            gram[item, pivot, pivot] *= -1.0
    return gram, rhs


def assert_fails(gram, rhs, expected):
    """Require these pivots, NaN for the items that have one, and the solutions of the others."""
    solution, info = solve_on_cuda(gram, rhs)
    assert info.tolist() == expected
    for item, pivot in enumerate(expected):
        if pivot:
            assert solution[item].isnan().all()
        else:
            assert same_bits(solution[item], solve_on_cuda(gram[item], rhs[item])[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_first_failing_pivot_is_that_of_lapack(dtype):
    gram, rhs = with_failing_pivots((*PIVOTS, None), dtype)
    expected = torch.linalg.cholesky_ex(gram).info.tolist()
    assert expected == [*(pivot + 1 for pivot in PIVOTS), 0]
    assert_fails(gram, rhs, expected)


def test_later_failures_do_not_count():
    gram, rhs = with_failing_pivots((None, 70, None), torch.float32)
    gram[1, 90, 90] = gram[1, 129, 129] = gram[2, 3, 3] = gram[2, 2, 2] = -1.0
    assert_fails(gram, rhs, [0, 71, 3])


@pytest.mark.parametrize("n", [1, 2, 64, 65])
@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e-40])
def test_what_is_no_pivot(n, value):
    """LAPACK takes infinity, and a number without a reciprocal, for good pivots."""
    gram = torch.eye(n).repeat(3, 1, 1)
    gram[0, n - 1, n - 1] = gram[2, 0, 0] = value
    assert_fails(gram, torch.ones(3, n, 2), [n, 0, 1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "place", [(1, 0), (63, 5), (64, 0), (70, 66), (129, 63), (129, 128)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_element_fails_in_its_row(dtype, place, value):
    gram, rhs = systems(2, 130, 3, dtype)
    gram[1, place[0], place[1]] = value
    assert_fails(gram, rhs, [0, place[0] + 1])


# What is touched.

CANARY = 777.0


class Guarded:
    """Numbers with canaries on both sides."""

    def __init__(self, numbers: torch.Tensor, margin: int = 16):
        self.shape, self.margin = numbers.shape, margin
        canary = torch.full((margin,), CANARY).to(numbers.dtype)
        self.storage = torch.cat((canary, numbers.flatten(), canary))
        self.address = self.storage[margin:].data_ptr()

    def numbers(self) -> torch.Tensor:
        ends = self.storage[: self.margin], self.storage[-self.margin :]
        assert all((end == CANARY).all() for end in ends)
        return self.storage[self.margin : -self.margin].view(self.shape)


@pytest.fixture
def call(emulated_module):
    """A guarded call, which returns all that it may write; arguments can be replaced."""

    def called(gram, rhs, /, margin=16, **changes):
        items, n, columns = rhs.shape
        bits = 8 * gram.element_size()
        size = emulated_module.cuda_cholesky_solve_workspace(bits, items, n)
        given = {
            "rhs": Guarded(rhs, margin),
            "info": Guarded(torch.full((items,), -1, dtype=torch.int32)),
            "gram": Guarded(gram, margin),
            "workspace": Guarded(torch.full((size // (bits // 8),), math.nan, dtype=gram.dtype)),
        }
        arguments = {
            **{name: guarded.address for name, guarded in given.items()},
            **{"element_bits": bits, "items": items, "n": n, "columns": columns},
            **{"stream": (0, 0)},
        }
        emulated_module.cuda_cholesky_solve(**{**arguments, **changes})
        return [guarded.numbers() for guarded in given.values()]

    return called


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 5), (1, 64, 64), (2, 65, 65), (1, 130, 17)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("margin", [16, 5], ids=["aligned", "not aligned"])
def test_nothing_else_is_written(call, dtype, margin, shape):
    gram, rhs = systems(*shape, dtype)
    solution, info, used, workspace = call(gram, rhs, margin)
    assert same_bits(solution, solve_on_cuda(gram, rhs)[0]) and not info.any()
    assert torch.equal(torch.triu(used, 1), torch.triu(gram, 1))
    assert workspace.isfinite().all()


def test_the_workspace_is_a_tile_for_every_64_rows(emulated_module):
    size = emulated_module.cuda_cholesky_solve_workspace
    assert [size(32, 1, n) for n in (0, 1, 64, 65)] == [0, 16384, 16384, 32768]
    assert size(64, 3, 4096) == 3 * 64 * 64 * 64 * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"element_bits": 16}, "element_bits must be 32 or 64, got 16"),
        ({"items": -1}, "items must be from 0 to 65535, got -1"),
        ({"items": 65536}, "items must be from 0 to 65535, got 65536"),
        ({"n": -3}, "n must be from 0 to 16384, got -3"),
        ({"n": 16385}, "n must be from 0 to 16384, got 16385"),
        ({"columns": -1}, "columns must be from 0 to 1073741824, got -1"),
        ({"gram": 0}, "gram is a null pointer"),
        ({"rhs": 0}, "rhs is a null pointer"),
        ({"info": 0}, "info is a null pointer"),
        ({"workspace": 0}, "workspace is a null pointer"),
        ({"gram": 4098}, "gram is at 0x1002, which is no multiple of 4"),
        ({"rhs": 4100, "element_bits": 64}, "rhs is at 0x1004, which is no multiple of 8"),
        ({"info": 4097}, "info is at 0x1001, which is no multiple of 4"),
        ({"workspace": 4104}, "workspace is at 0x1008, which is no multiple of 16"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(call, changes, message):
    with pytest.raises(ValueError, match=message):
        call(torch.eye(3)[None], torch.ones(1, 3, 2), **changes)


@pytest.mark.parametrize("size", ["items", "n", "columns"])
def test_empty_calls_touch_nothing(call, size):
    nowhere = dict.fromkeys(("gram", "rhs", "info", "workspace"), 0)
    call(torch.eye(3)[None], torch.ones(1, 3, 2), **{size: 0}, **nowhere)
