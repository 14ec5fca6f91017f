"""running_moments: the kernels against the float64 recurrence."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, lay_out, random_rows, same_bits
from ops.tolerances import assert_as_accurate, floor, largest_error

from pyeditfast import reference
from pyeditfast.ops import RunningMoments
from pyeditfast_kernels import running_moments as kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def assert_equals_reference(rows, variance="unbiased", segments=None, *, before=None) -> None:
    """Update with ``rows`` and compare with the recurrence in float64 and with plain float32."""
    d = rows.shape[-1]
    moments = RunningMoments(d, variance, device=rows.device)
    expected = reference.RunningMoments(d, variance)
    plain = reference.RunningMoments(d, variance, torch.float32)
    for batch, cut in ((before, None), (rows, segments)):
        if batch is not None:
            moments.update(batch, segments=cut)
            flat = batch.reshape(-1, d).cpu()
            expected.update(flat.double(), segments=cut)
            plain.update(flat.float(), segments=cut)
    n = moments.count
    assert n == expected.count
    # A mean is there to be taken from rows before they are divided by the deviation.
    size = expected.mean.abs() + expected.std
    error = ((moments.mean.cpu() - expected.mean).abs() / size.max()).max().item()
    yardstick = ((plain.mean.double() - expected.mean).abs() / size.max()).max().item()
    assert error <= 2.0 * yardstick + floor(torch.float32, n), (error, yardstick)
    assert_as_accurate(moments.std.float().cpu(), plain.std, expected.std, n)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 1), (1, 3), (3, 2), (17, 127), (64, 128), (65, 129), (131, 131), (200, 257)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_recurrence(device, dtype, shape):
    assert_equals_reference((1.0 + random_rows(*shape, scale=3.0)).to(device, dtype))


def test_many_rows_take_long_chunks(device):
    n = kernels.LONG_CHUNKS_FROM + 100
    assert kernels.rows_of_a_chunk(n) > kernels.rows_of_a_chunk(kernels.LONG_CHUNKS_FROM - 1)
    assert_equals_reference((1.0 + random_rows(n, 3)).to(device, torch.bfloat16))


@settings(deadline=None, max_examples=15)
@given(
    n=st.integers(1, 80),
    d=st.integers(1, 40),
    cuts=st.lists(st.integers(1, 79), max_size=3),
    dtype=st.sampled_from(DTYPES),
    variance=st.sampled_from(["unbiased", "published"]),
    mean=st.sampled_from([0.0, -1e3]),
)
def test_any_shape_and_any_cut(device, n, d, cuts, dtype, variance, mean):
    places = [0, *sorted({cut for cut in cuts if cut < n}), n]
    segments = [stop - start for start, stop in itertools.pairwise(places)]
    rows = (mean + random_rows(n, d, seed=n)).to(device, dtype)
    before = (mean + random_rows(5, d, seed=d)).to(device, dtype)
    assert_equals_reference(rows, variance, segments, before=before)


# Digits.


def test_large_mean_and_small_spread(device):
    # Ten spacings of float32 are all the spread there is.
    rows = 1e4 + 1e-2 * random_rows(301, 13)
    exact = rows.double()
    moments = RunningMoments(13, device=device)
    for piece in rows.to(device).split(100):
        moments.update(piece)
    assert largest_error(moments.mean.cpu(), exact.mean(0)) <= 1e-12
    assert largest_error(moments.std.cpu(), exact.std(0)) <= 1e-6


@pytest.mark.parametrize("row", [0, 63, 64, 200])
def test_a_row_far_from_the_others(device, row):
    """Rows are shifted by the mean of the first ones; even an outlier there costs no digit."""
    rows = random_rows(201, 13)
    rows[row] = 1e6
    moments = RunningMoments(13, device=device)
    moments.update(rows.to(device))
    tolerance = floor(torch.float32, 201)
    assert largest_error(moments.mean.cpu(), rows.double().mean(0)) <= tolerance
    assert largest_error(moments.std.cpu(), rows.double().std(0)) <= tolerance


@pytest.mark.parametrize("value", [0.1, -3.3, 1e4, 1e-6])
@pytest.mark.parametrize("segments", [None, [1], [70], [1, 1, 1], [66, 1, 5]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_columns_have_no_deviation_at_all(device, dtype, segments, value):
    n = sum(segments) if segments else 70
    constants = torch.tensor([value, 0.7 * value, 1.3 * value]).to(device, dtype)
    moments = RunningMoments(3, "published" if segments else "unbiased", device=device)
    for _ in range(2):
        moments.update(constants.expand(n, 3), segments=segments)
        assert torch.equal(moments.mean, constants.double())
        assert not moments.std.any()


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e15),
        (torch.float32, 1e-15),
        (torch.bfloat16, 1e15),
        (torch.bfloat16, 1e-15),
        (torch.float16, 1e4),
        (torch.float16, 1e-6),
    ],
    ids=str,
)
def test_extreme_magnitudes(device, dtype, scale):
    rows = random_rows(77, 19, scale=scale).clamp(-6e4 if dtype == torch.float16 else -1e30, None)
    assert_equals_reference(rows.to(device, dtype))


def test_a_bad_number_stays_in_its_column(device):
    rows = random_rows(70, 9)
    expected = RunningMoments(9, device=device)
    expected.update(rows.to(device))
    for value in (float("nan"), float("inf")):
        rows[33, 4] = value
        moments = RunningMoments(9, device=device)
        moments.update(rows.to(device))
        assert moments.std.isnan().tolist() == [column == 4 for column in range(9)]
        moments._squares[4], moments._mean[4] = expected._squares[4], expected._mean[4]
        for name, state in moments.state_dict().items():
            assert same_bits(state, expected.state_dict()[name])


# Segments.


@pytest.mark.parametrize(
    "segments", [[20], [3, 4, 13], [1, 19], [5, 1, 1, 13], [1] * 9, [70, 1, 65, 129]], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_published_variance(device, dtype, segments):
    rows = (2.0 + random_rows(sum(segments), 5)).to(device, dtype)
    moments = RunningMoments(5, "published", device=device)
    expected = reference.RunningMoments(5, "published")
    moments.update(rows, segments=segments)
    expected.update(rows.cpu().double(), segments=segments)
    assert largest_error(moments.mean.cpu(), expected.mean) <= 1e-7
    assert largest_error(moments.std.cpu(), expected.std) <= 1e-6


def test_without_segments_the_published_variance_takes_one(device):
    rows = random_rows(7, 3).to(device)
    published = RunningMoments(3, "published", device=device)
    published.update(rows)
    variance = rows.cpu().double().var(0) * 7 / 6
    assert largest_error(published.std.square().cpu(), variance) <= 1e-6


def test_segments_do_not_matter_to_the_unbiased_variance(device):
    rows = random_rows(20, 3).to(device)
    cut, whole = RunningMoments(3, device=device), RunningMoments(3, device=device)
    cut.update(rows, segments=[5, 1, 14])
    whole.update(rows)
    for name, value in cut.state_dict().items():
        assert same_bits(value, whole.state_dict()[name])


@pytest.mark.parametrize("segments", [[1], [64], [65], [3, 200, 1, 64, 64]], ids=str)
def test_chunks_cover_every_row_once_and_cross_no_segment(segments):
    cuts = kernels.cut_into_chunks(segments, 64)
    assert [row for _, start, stop, _ in cuts for row in range(start, stop)] == list(
        range(sum(segments))
    )
    bounds = [(sum(segments[:i]), sum(segments[: i + 1])) for i in range(len(segments))]
    assert sorted({(first, end) for first, _, _, end in cuts}) == bounds
    assert all(first <= start < stop <= min(end, start + 64) for first, start, stop, end in cuts)


# Layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_are_read_and_not_written(device, dtype, layout):
    plain = random_rows(70, 19).to(device, dtype)
    rows, storage = lay_out(plain, layout)
    rows, storage = rows.to(device), storage.to(device)
    before = storage.clone()
    moments, expected = RunningMoments(19, device=device), RunningMoments(19, device=device)
    moments.update(rows)
    expected.update(plain)
    for name, value in moments.state_dict().items():
        assert same_bits(value, expected.state_dict()[name])
    assert same_bits(storage, before)


def test_rows_of_a_slice_that_is_not_aligned(device):
    storage = random_rows(41, 50, dtype=torch.bfloat16).to(device)
    assert_equals_reference(storage[1:, 1:38])


def test_leading_dimensions_are_rows(device):
    assert_equals_reference(random_rows(2, 3, 7, 5).to(device))


def test_expanded_rows(device):
    assert_equals_reference(random_rows(2, 1, 4).to(device).expand(2, 9, 4))


@pytest.mark.parametrize("variance", ["unbiased", "published"])
def test_parts_side_by_side_are_joined_rows(device, variance):
    keys = random_rows(2, 30, 7, dtype=torch.bfloat16).to(device)
    grads = random_rows(2, 30, 5, seed=1).to(device)
    nothing = torch.zeros(2, 30, 0, device=device)
    parts = RunningMoments(12, variance, device=device)
    joined = RunningMoments(12, variance, device=device)
    parts.update(keys, nothing, grads, segments=[10, 1, 49])
    joined.update(torch.cat([keys.float(), grads], -1), segments=[10, 1, 49])
    assert parts.count == 60
    for name, value in parts.state_dict().items():
        assert largest_error(value, joined.state_dict()[name].double()) <= floor(torch.float32, 60)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)], ids=str)
def test_no_rows_change_nothing(device, shape):
    moments = RunningMoments(3, device=device)
    moments.update(random_rows(5, 3).to(device))
    before = moments.state_dict()
    moments.update(torch.zeros(shape, device=device))
    for name, value in moments.state_dict().items():
        assert same_bits(value, before[name])


# Repeatability, refusals.


@pytest.mark.parametrize("variance", ["unbiased", "published"])
def test_gives_the_same_bits_twice(device, variance):
    rows = random_rows(257, 61).to(device)
    first, second = (RunningMoments(61, variance, device=device) for _ in range(2))
    for moments in (first, second):
        moments.update(rows, segments=[100, 57, 100])
    for name, value in first.state_dict().items():
        assert same_bits(value, second.state_dict()[name])


def test_float64_is_refused(device):
    message = "not used: its kernels take bfloat16, float16 and float32, not torch.float64"
    moments = RunningMoments(3, device=device)
    with pytest.raises(ValueError, match=re.escape(message)):
        moments.update(random_rows(5, 3, dtype=torch.float64).to(device))
    assert moments.count == 0
