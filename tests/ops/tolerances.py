"""How far an op may be from float64: at most twice what plain torch loses, plus a floor.

The floor is for the luck of a single draw: one rounding an addition, added up at random, grows with
the root of the reduction's length. Errors are measured against the largest exact entry, so that a
single wrong entry shows among a million good ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""The largest relative error of one rounding to nearest."""


def largest_error(result: Tensor, exact: Tensor) -> float:
    """Return ``max |result − exact| / max |exact|``; NaN where the result has one."""
    assert result.shape == exact.shape, (result.shape, exact.shape)
    if exact.numel() == 0:
        return 0.0
    difference = (result.double() - exact.double()).abs().max().item()
    largest = exact.abs().max().item()
    return difference / largest if largest else difference


def floor(dtype: torch.dtype, length: int) -> float:
    """Return the error granted to a reduction of ``length`` terms, whatever plain torch loses."""
    return UNIT_ROUNDOFF[dtype] * (1.0 + math.sqrt(length))


def assert_as_accurate(result: Tensor, naive: Tensor, exact: Tensor, length: int) -> None:
    """Require that ``result`` loses at most twice what ``naive`` loses in the same dtype."""
    assert result.dtype == naive.dtype, (result.dtype, naive.dtype)
    assert exact.dtype == torch.float64, exact.dtype
    error, yardstick = largest_error(result, exact), largest_error(naive, exact)
    assert error <= 2.0 * yardstick + floor(result.dtype, length), (error, yardstick)
