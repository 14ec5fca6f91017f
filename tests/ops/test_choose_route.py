"""choose_route: the memory with the largest gap among those above their threshold."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out, random_rows, same_bits
from memories import exact_route

from pyeditfast import reference
from pyeditfast.ops import choose_route

NAN, INF = math.nan, math.inf

# Few values, so that gaps equal each other and their thresholds.
FEW = st.sampled_from([0.0, 1.0, 2.0, 3.0, INF, NAN])
GAPS = FEW | st.floats(0, width=32)
THRESHOLDS = FEW | st.just(-INF) | st.floats(width=32)


@st.composite
def gaps_and_thresholds(draw):
    memories = draw(st.integers(0, 9))
    row = st.lists(GAPS, min_size=memories, max_size=memories)
    thresholds = draw(st.lists(THRESHOLDS, min_size=memories, max_size=memories))
    return draw(st.lists(row, max_size=5)), thresholds


@pytest.mark.parametrize("function", [choose_route, reference.choose_route])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(case=gaps_and_thresholds())
def test_is_the_loop(function, dtype, case):
    rows, limits = case
    gaps = torch.tensor(rows, dtype=dtype).reshape(len(rows), len(limits))
    thresholds = torch.tensor(limits, dtype=torch.float32)
    before = gaps.clone(), thresholds.clone()
    route = function(gaps, thresholds)
    assert route.dtype == torch.int64
    assert route.tolist() == exact_route(rows, limits)
    assert same_bits(gaps, before[0]) and same_bits(thresholds, before[1])


@given(case=gaps_and_thresholds())
def test_a_row_is_routed_by_itself(case):
    rows, limits = case
    thresholds = torch.tensor(limits)
    gaps = torch.tensor(rows).reshape(len(rows), len(limits))
    alone = [choose_route(row[None], thresholds).item() for row in gaps]
    assert choose_route(gaps, thresholds).tolist() == alone


@pytest.mark.parametrize(
    ("gaps", "thresholds", "expected"),
    [
        ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5], 2),
        # The largest gap is below its threshold.
        ([1.0, 2.0, 3.0], [0.5, 0.5, 4.0], 1),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], -1),
        # Far above a threshold is not what counts.
        ([5.0, 6.0], [0.1, 5.9], 1),
        ([2.0, 2.0, 2.0], [0.0, 0.0, 0.0], 0),
        ([2.0, 2.0, 2.0], [2.0, 0.0, 0.0], 1),
        ([NAN, 1.0], [0.0, 0.0], 1),
        ([1.0, NAN], [0.0, 0.0], 0),
        ([NAN, NAN], [0.0, 0.0], -1),
        ([NAN, NAN], [-INF, -INF], -1),
        ([NAN, 1.0], [0.0, 1.0], -1),
        ([9.0, 1.0], [NAN, 0.0], 1),
        ([9.0, 1.0], [INF, INF], -1),
        ([9.0, 1.0], [INF, 0.0], 1),
        ([INF, 1.0], [INF, 0.0], 1),
        ([INF, 1.0], [1e30, 0.0], 0),
        ([0.0, 0.0], [-INF, -INF], 0),
        ([0.0, 0.0], [INF, -INF], 1),
        ([0.0], [0.0], -1),
        ([0.0], [-0.0], -1),
        ([], [], -1),
    ],
)
@pytest.mark.parametrize("function", [choose_route, reference.choose_route])
def test_by_hand(function, gaps, thresholds, expected):
    route = function(torch.tensor([gaps] * 3), torch.tensor(thresholds))
    assert route.tolist() == [expected] * 3


@pytest.mark.parametrize("memories", [0, 1, 9])
def test_no_queries(memories):
    route = choose_route(torch.zeros(0, memories), torch.zeros(memories))
    assert same_bits(route, torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_gaps_of_any_dtype(dtype, layout):
    gaps, storage = lay_out(random_rows(7, 3, dtype=dtype, seed=2).abs(), layout)
    before = storage.clone()
    thresholds = torch.tensor([0.5, 9.0, 0.75, 9.0, 1.0])[::2]
    expected = exact_route(gaps.tolist(), thresholds.tolist())
    assert set(expected) == {-1, 0, 1, 2}
    assert choose_route(gaps, thresholds).tolist() == expected
    assert same_bits(storage, before)


def test_thresholds_are_not_rounded_to_the_dtype_of_the_gaps():
    # In bfloat16 this threshold would be 1, and the gap not above it.
    gaps, threshold = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([1.0 - 2.0**-20])
    assert choose_route(gaps, threshold).tolist() == [0]


@pytest.mark.parametrize(
    ("gaps", "thresholds", "error", "message"),
    [
        ([[1.0]], torch.ones(1), TypeError, "gaps is a list, not a torch.Tensor"),
        (torch.ones(1, 1), [1.0], TypeError, "thresholds is a list, not a torch.Tensor"),
        (torch.ones(1, 1).long(), torch.ones(1), TypeError, "gaps has dtype torch.int64"),
        (torch.ones(1, 1), torch.ones(1).bool(), TypeError, "thresholds has dtype torch.bool"),
        (torch.ones(3), torch.ones(3), ValueError, "gaps (3,) and thresholds (3,); [batch, "),
        (torch.ones(2, 3), torch.ones(2), ValueError, "gaps (2, 3) and thresholds (2,)"),
        (torch.ones(2, 3), torch.ones(1), ValueError, "gaps (2, 3) and thresholds (1,)"),
        (torch.ones(2, 3), torch.ones(2, 3), ValueError, "gaps (2, 3) and thresholds (2, 3)"),
        (torch.ones(2, 0), torch.ones(()), ValueError, "gaps (2, 0) and thresholds ()"),
        (torch.ones(1, 2, 3), torch.ones(2, 3), ValueError, "gaps (1, 2, 3) and thresholds (2, 3)"),
        (
            torch.ones(2, 3),
            torch.ones(3, device="meta"),
            ValueError,
            "gaps is on cpu and thresholds on meta",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_show_the_offending_value(gaps, thresholds, error, message):
    with pytest.raises(error, match=re.escape(message)):
        choose_route(gaps, thresholds)
