"""Ways to cut rows into updates, and when two sets of moments are equal."""

from __future__ import annotations

import itertools

from tolerances import largest_error
from torch import Tensor


def assert_equal_moments(moments, other, tolerance: float = 0.0) -> None:
    assert moments.count == other.count
    assert largest_error(moments.mean, other.mean) <= tolerance
    assert largest_error(moments.std, other.std) <= tolerance


def pieces(rows: Tensor, cuts: list[int]) -> list[Tensor]:
    """Cut rows at the given places, which may repeat and so leave pieces without rows."""
    places = [0, *sorted(cut % (rows.shape[0] + 1) for cut in cuts), rows.shape[0]]
    return [rows[start:stop] for start, stop in itertools.pairwise(places)]
