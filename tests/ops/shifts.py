"""Random shifts, and what a weight must be after one was added."""

from __future__ import annotations

import torch
from layouts import DTYPES, random_rows
from tolerances import UNIT_ROUNDOFF
from torch import Tensor

from pyeditfast.ops import Shift

HALVES = (torch.bfloat16, torch.float16)

# Stochastic rounding is for 16-bit weights.
CASES = [(dtype, rounding) for dtype in DTYPES for rounding in ("nearest", "compensated")]
CASES += [(dtype, "stochastic") for dtype in HALVES]

# [..., rank, d_out, d_in]
SIZES = [(1, 1, 1), (3, 7, 5), (5, 13, 31), (2, 4, 17, 11), (3, 2, 2, 5, 7), (40, 101, 203)]


def every_value(dtype: torch.dtype) -> Tensor:
    """Return every finite value of a 16-bit dtype, sorted, in float64."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = codes.view(dtype).double()
    return values[values.isfinite()].unique()


def exact_neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the neighbours of ``exact`` in ``dtype``, equal where ``dtype`` holds it."""
    values = every_value(dtype)
    below = values[torch.searchsorted(values, exact.contiguous(), right=True) - 1]
    above = values[torch.searchsorted(values, exact.contiguous())]
    return below, above


def make_shift(form: str, *sizes: int, seed: int = 1, scale: float = 1e-3) -> Shift:
    """Return a random shift for a weight ``[..., d_out, d_in]``."""
    *lead, rank, d_out, d_in = sizes
    left = random_rows(*lead, rank, d_out, seed=seed, scale=scale)
    right = random_rows(*lead, rank, d_in, seed=seed + 1)
    if form == "dual":
        return Shift("dual", rank, left=left, right=right)
    return Shift("primal", min(d_out, d_in), matrix=left.mT @ right)


def dense_shift(value: Tensor) -> Shift:
    return Shift("primal", min(value.shape[-2:]), matrix=value)


def weight_of(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    *lead, _, d_out, d_in = sizes
    return random_rows(*lead, d_out, d_in, dtype=dtype, scale=0.02)


def exact_sum(weight: Tensor, shift: Shift) -> Tensor:
    """Return ``W + Δᵀ`` in float64."""
    if shift.matrix is not None:
        return weight.double() + shift.matrix.double()
    return weight.double() + shift.left.double().mT @ shift.right.double()


def float32_slack(weight: Tensor, shift: Shift) -> Tensor:
    """Return how far a float32 sum may be from the exact one, element by element.

    The classical bound of a product of length n, and one rounding of the sum.
    """
    product = torch.zeros_like(weight, dtype=torch.float64)
    if shift.matrix is None:
        magnitudes = shift.left.double().abs().mT @ shift.right.double().abs()
        product = (shift.rank + 1) * UNIT_ROUNDOFF[torch.float32] * magnitudes
    if weight.dtype == torch.float64:
        return product + UNIT_ROUNDOFF[torch.float64] * exact_sum(weight, shift).abs()
    return product + UNIT_ROUNDOFF[torch.float32] * (exact_sum(weight, shift).abs() + product)


def assert_nearest(result: Tensor, weight: Tensor, shift: Shift) -> None:
    """Require the rounded exact sum, up to what the float32 sum may have moved.

    Rounding is monotonic, so the result must lie between the roundings of both ends of the slack;
    for a 16-bit weight those ends round alike but for a few elements in ten thousand.
    """
    exact, slack = exact_sum(weight, shift), float32_slack(weight, shift)
    low, high = (exact - slack).to(weight.dtype), (exact + slack).to(weight.dtype)
    assert bool(((low <= result) & (result <= high)).all())
    if weight.element_size() == 2:
        differ = (result != exact.to(weight.dtype)).double().mean().item()
        assert differ <= 1e-3


def half_a_spacing(magnitude, dtype: torch.dtype):
    """Return the most that rounding a number of this magnitude to ``dtype`` loses."""
    numbers = torch.finfo(dtype)
    return UNIT_ROUNDOFF[dtype] * magnitude + 0.5 * numbers.smallest_normal * numbers.eps
