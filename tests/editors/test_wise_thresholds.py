"""Calibrated thresholds: the fewest errors, and a margin on both sides."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyeditfast.editors.wise_thresholds import calibrate

GAPS = st.lists(st.floats(0, 1e3, allow_subnormal=False), max_size=12)


def errors(in_gaps, out_gaps, threshold):
    missed = sum(gap <= threshold for gap in in_gaps) / len(in_gaps)
    strayed = sum(gap > threshold for gap in out_gaps) / len(out_gaps) if out_gaps else 0.0
    return missed, strayed


def test_separable_gaps_get_the_geometric_middle_and_no_errors():
    result = calibrate([8.0, 20.0], [0.5, 2.0])
    assert result.threshold == pytest.approx(4.0)
    assert (result.missed, result.strayed) == (0.0, 0.0)


def test_without_out_of_scope_gaps_the_threshold_is_half_of_the_smallest():
    assert calibrate([3.0, 5.0], []).threshold == pytest.approx(1.5)


def test_equal_gaps_cannot_be_told_apart():
    result = calibrate([1.0, 1.0], [1.0, 1.0])
    assert result.missed + result.strayed == 1.0


def test_reports_both_kinds_of_error():
    result = calibrate([1.0, 10.0, 11.0, 12.0], [0.1, 0.2, 0.3, 50.0])
    assert (result.missed, result.strayed) == errors(
        [1.0, 10.0, 11.0, 12.0], [0.1, 0.2, 0.3, 50.0], result.threshold
    )
    assert (result.missed, result.strayed) == (0.0, 0.25)


@given(GAPS.filter(bool), GAPS)
@example([5e-113], [1e-220])
@example([math.nextafter(3.0, 4.0)], [3.0])
@example([3.0], [math.nextafter(3.0, 0.0)])
def test_no_threshold_makes_fewer_errors(in_gaps, out_gaps):
    result = calibrate(in_gaps, out_gaps)
    found = errors(in_gaps, out_gaps, result.threshold)
    assert (result.missed, result.strayed) == found
    for threshold in (0.0, *in_gaps, *out_gaps):
        assert sum(found) <= sum(errors(in_gaps, out_gaps, threshold)) + 1e-12
    assert math.isfinite(result.threshold) and result.threshold >= 0


def test_refuses_what_tells_nothing():
    with pytest.raises(ValueError, match="in_gaps is empty"):
        calibrate([], [1.0])
    with pytest.raises(ValueError, match="a gap is NaN"):
        calibrate([1.0, math.nan], [])
