"""``W ← round(W + Δᵀ)`` with three ways to round to a 16-bit weight.

*nearest* is the dtype's own rounding. *stochastic* takes the upper of the two neighbours with the
probability that makes the result unbiased (the uniform numbers come from Philox, so a seed
reproduces them). *compensated* keeps what rounding lost in a remainder beside the weight and adds
it back next time (Kahan, Comm. ACM 8, 1965).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyeditfast.reference.random_mask import random_uniform
from pyeditfast.reference.solve_shift import Shift


def neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the values of ``dtype`` next to ``exact``: the largest ≤ it, the smallest ≥ it."""
    nearest = exact.to(dtype)
    bits = nearest.view(torch.int16)
    negative = bits < 0
    # Neighbouring floats are neighbouring integers, mirrored below zero; zero itself has two bit
    # patterns.
    up = torch.where(negative, bits - 1, bits + 1)
    down = torch.where(negative, bits + 1, bits - 1)
    smallest = torch.tensor(1, dtype=torch.int16)
    smallest_negative = torch.tensor(-32767, dtype=torch.int16)
    up = torch.where(nearest == 0, smallest, up).view(dtype)
    down = torch.where(nearest == 0, smallest_negative, down).view(dtype)
    back = nearest.to(exact.dtype)
    return torch.where(back <= exact, nearest, down), torch.where(back >= exact, nearest, up)


def round_stochastically(exact: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    """Round ``exact`` (float32 or float64) to 16-bit ``dtype``, upward where ``uniform`` < the
    fraction.

    ``uniform`` holds numbers in [0, 1), the shape of ``exact``. Unbiased: E[result] = exact.
    """
    low, high = neighbours(exact, dtype)
    gap = high.to(exact.dtype) - low.to(exact.dtype)
    fraction = torch.where(gap > 0, (exact - low.to(exact.dtype)) / gap, torch.zeros_like(exact))
    return torch.where(uniform < fraction, high, low)


def apply_shift_(
    weight: Tensor,
    shift: Shift,
    rounding: str = "nearest",
    seed: int | None = None,
    *,
    remainder: Tensor | None = None,
) -> Tensor:
    """Add ``Δᵀ`` to ``weight`` ``[..., d_out, d_in]`` in place, computing in float64."""
    exact = weight.double() + shift.dense().double()
    if rounding == "stochastic":
        assert seed is not None
        uniform = random_uniform(seed, tuple(weight.shape), device=weight.device)
        return weight.copy_(round_stochastically(exact, weight.dtype, uniform))
    if rounding == "compensated":
        assert remainder is not None
        exact = exact + remainder.double()
        weight.copy_(exact)
        remainder.copy_(exact - weight.double())
        return weight
    return weight.copy_(exact)
