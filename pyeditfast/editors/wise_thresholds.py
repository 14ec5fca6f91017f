"""Thresholds that lie between the gaps of edited and of unrelated queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Calibration:
    """A ``threshold`` and its errors on the gaps that it was set by.

    ``missed``: the share of edited queries that the main memory would answer; ``strayed``: the
    share of unrelated ones that the side memory would.
    """

    threshold: float
    missed: float
    strayed: float

    def __str__(self) -> str:
        return (
            f"expected errors: {100 * self.missed:.1f} % of its edit prompts below the threshold, "
            f"{100 * self.strayed:.1f} % of locality prompts above it"
        )


def calibrate(in_gaps: Sequence[float], out_gaps: Sequence[float]) -> Calibration:
    """Return the threshold with the smallest sum of both shares of errors.

    A query is in scope if its gap exceeds the threshold. Of equally good thresholds the one in the
    middle of the widest interval is taken, in the logarithm where the gaps are positive, since gaps
    spread over orders of magnitude. Raises ``ValueError`` without in-scope gaps or for NaN.
    """
    if not in_gaps:
        raise ValueError("in_gaps is empty; a threshold needs the gap of at least one edit")
    if any(math.isnan(gap) for gap in (*in_gaps, *out_gaps)):
        raise ValueError("a gap is NaN")
    edges = sorted({0.0, *in_gaps, *out_gaps})
    best: tuple[float, float] | None = None
    threshold = 0.0
    for low, high in zip(edges, [*edges[1:], math.inf], strict=True):
        # Any threshold in [low, high) makes the same decisions.
        errors = _share(in_gaps, low, above=False) + _share(out_gaps, low, above=True)
        width = math.inf if low == 0.0 else math.log(high / low)
        width = 0.0 if math.isinf(high) else min(width, 1e9)
        if best is None or (errors, -width) < best:
            best = (errors, -width)
            threshold = _middle(low, high)
    return Calibration(
        threshold,
        _share(in_gaps, threshold, above=False),
        _share(out_gaps, threshold, above=True),
    )


def _middle(low: float, high: float) -> float:
    if math.isinf(high):
        return low
    if low == 0.0:
        return 0.5 * high
    # The product of two small gaps can be 0, and rounding can reach the next gap.
    middle = math.sqrt(low) * math.sqrt(high)
    return min(max(middle, low), math.nextafter(high, 0.0))


def _share(gaps: Sequence[float], threshold: float, *, above: bool) -> float:
    if not gaps:
        return 0.0
    return sum((gap > threshold) == above for gap in gaps) / len(gaps)
