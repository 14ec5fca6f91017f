"""RunningMoments: the published variance, merging, and the state that is saved."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import random_rows, same_bits
from moments import assert_equal_moments, pieces
from safetensors.torch import load_file, save_file
from tolerances import largest_error
from torch import Tensor

from pyeditfast import reference
from pyeditfast.ops import RunningMoments


def published_by_hand(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation by the published recurrence, one feature at a time."""
    means, stds = [], []
    for feature in range(batches[0].shape[1]):
        n, mean, squares = 0, 0.0, 0.0
        for batch in batches:
            column = batch[:, feature].double().tolist()
            m = len(column)
            own_mean = math.fsum(column) / m
            variance = math.fsum((x - own_mean) ** 2 for x in column) / (m - 1) if m > 1 else 0.0
            delta = own_mean - mean
            squares += m * variance + n * m * delta * delta / (n + m)
            mean += m * delta / (n + m)
            n += m
        means.append(mean)
        stds.append(math.sqrt(squares / (n - 1)))
    return torch.tensor(means, dtype=torch.float64), torch.tensor(stds, dtype=torch.float64)


# The published variance.


@pytest.mark.parametrize("segments", [[20], [3, 4, 13], [1, 19], [5, 1, 1, 13], [1] * 20], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_published_variance_is_the_published_recurrence(dtype, segments):
    rows = 2.0 + random_rows(20, 3, dtype=dtype)
    expected_mean, expected_std = published_by_hand(list(rows.split(segments)))
    for moments in (RunningMoments(3, "published"), reference.RunningMoments(3, "published")):
        moments.update(rows, segments=segments)
        assert moments.count == 20
        tolerance = 1e-14 if dtype == torch.float64 or len(segments) == 20 else 1e-6
        assert largest_error(moments.mean, expected_mean) <= tolerance
        assert largest_error(moments.std, expected_std) <= tolerance


def test_published_variance_of_one_micro_batch_is_larger_by_m_over_m_minus_one():
    rows = random_rows(7, 3, dtype=torch.float64)
    published = RunningMoments(3, "published")
    published.update(rows)
    assert largest_error(published.std.square(), rows.var(0) * 7 / 6) <= 1e-14


def test_published_variance_takes_one_row_as_variance_zero():
    moments = RunningMoments(1, "published")
    moments.update(torch.tensor([[1.0]]))
    moments.update(torch.tensor([[3.0]]))
    # 1 row, then 1 · 1 · (3 − 1)² / 2 = 2, over N − 1 = 1.
    # The last digit of torch's root is the processor's.
    assert moments.std.item() == pytest.approx(math.sqrt(2.0), rel=1e-15)


@pytest.mark.parametrize("segments", [[20], [3, 4, 13], [5, 1, 1, 13]], ids=str)
def test_segments_are_separate_updates(segments):
    rows = random_rows(20, 3)
    at_once, one_by_one = RunningMoments(3, "published"), RunningMoments(3, "published")
    at_once.update(rows, segments=segments)
    for batch in rows.split(segments):
        one_by_one.update(batch)
    assert_equal_moments(at_once, one_by_one)


def test_segments_do_not_matter_to_the_unbiased_variance():
    rows = random_rows(20, 3)
    cut, whole = RunningMoments(3), RunningMoments(3)
    cut.update(rows, segments=[5, 1, 14])
    whole.update(rows)
    assert_equal_moments(cut, whole)


@pytest.mark.parametrize("segments", [[3, 3], [8], [7, 0], [8, -1], []], ids=str)
@pytest.mark.parametrize("variance", ["unbiased", "published"])
def test_segments_that_do_not_add_up(variance, segments):
    moments = RunningMoments(2, variance)
    message = f"segments {segments} do not cut 7 rows into micro-batches"
    with pytest.raises(ValueError, match=re.escape(message)):
        moments.update(torch.ones(7, 2), segments=segments)
    assert moments.count == 0


# Merging.


@pytest.mark.parametrize("variance", ["unbiased", "published"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_merging_in_any_order_is_updating(order, variance):
    batches = [random_rows(n, 5, seed=n, dtype=torch.float64) + n for n in (1, 8, 3, 20)]
    expected, merged = RunningMoments(5, variance), RunningMoments(5, variance)
    for batch in batches:
        expected.update(batch)
    for index in order:
        part = RunningMoments(5, variance)
        part.update(batches[index])
        merged.merge(part)
    assert_equal_moments(merged, expected, 1e-13)
    published = reference.RunningMoments(5, variance)
    for index in order:
        part = reference.RunningMoments(5, variance)
        part.update(batches[index])
        published.merge(part)
    assert_equal_moments(merged, published, 1e-13)


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(2, 40),
    cut=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    variance=st.sampled_from(["unbiased", "published"]),
)
def test_merging_two_is_updating_with_both(n, cut, seed, variance):
    rows = random_rows(n, 3, seed=seed, dtype=torch.float64)
    first, second, both = (RunningMoments(3, variance) for _ in range(3))
    for moments, batch in zip((first, second), pieces(rows, [cut]), strict=True):
        moments.update(batch)
        both.update(batch)
    first.merge(second)
    assert_equal_moments(first, both, 1e-13)


def test_merging_leaves_the_other_as_it_was():
    one, other = RunningMoments(3), RunningMoments(3)
    one.update(random_rows(5, 3))
    other.update(random_rows(7, 3, seed=1))
    before = other.state_dict()
    one.merge(other)
    one.update(random_rows(2, 3, seed=2))
    for name, value in other.state_dict().items():
        assert same_bits(value, before[name])


def test_merging_with_nothing_changes_nothing():
    moments, empty = RunningMoments(3), RunningMoments(3)
    moments.update(random_rows(5, 3))
    before = moments.copy()
    moments.merge(empty)
    assert_equal_moments(moments, before)
    empty.merge(moments)
    assert_equal_moments(empty, moments)
    nothing = RunningMoments(3)
    nothing.merge(RunningMoments(3))
    assert nothing.count == 0


def test_merging_with_itself_is_seeing_every_row_twice():
    rows = random_rows(9, 3, dtype=torch.float64)
    moments, twice = RunningMoments(3), RunningMoments(3)
    moments.update(rows)
    moments.merge(moments)
    twice.update(rows.repeat(2, 1))
    assert_equal_moments(moments, twice, 1e-14)


@pytest.mark.parametrize("other", [RunningMoments(4), RunningMoments(3, "published")], ids=repr)
def test_what_cannot_be_merged(other):
    moments = RunningMoments(3)
    with pytest.raises(ValueError, match=re.escape(f"{other!r} cannot be merged into {moments!r}")):
        moments.merge(other)


# State.


@pytest.mark.parametrize("count", [2**24 - 1, 2**24, 2**31, 2**53 + 1, 2**60 + 1])
def test_count_is_exact_however_large(count):
    moments = RunningMoments(1)
    moments.load_state_dict(
        {
            "count": torch.tensor(count),
            "mean": torch.zeros(1).double(),
            "squares": torch.tensor([float(count)]).double(),
        }
    )
    moments.update(torch.ones(1, 1))
    assert moments.count == count + 1
    assert moments.state_dict()["count"].item() == count + 1
    other = moments.copy()
    other.merge(moments)
    assert other.count == 2 * (count + 1)


def test_a_row_after_many_millions_still_counts():
    count = 2**24
    moments = RunningMoments(1)
    state = {"count": torch.tensor(count), "mean": torch.zeros(1), "squares": torch.zeros(1)}
    moments.load_state_dict(state)
    for _ in range(100):
        moments.update(torch.ones(1, 1))
    assert moments.mean.item() == pytest.approx(100 / (count + 100), rel=1e-12)


@pytest.mark.parametrize("variance", ["unbiased", "published"])
def test_state_round_trip(variance, tmp_path):
    moments = RunningMoments(5, variance)
    moments.update(random_rows(30, 5), segments=[10, 1, 19])
    save_file(moments.state_dict(), tmp_path / "moments.safetensors")
    for state in (moments.state_dict(), load_file(tmp_path / "moments.safetensors")):
        assert state["count"].dtype == torch.int64 and state["count"].shape == ()
        assert state["mean"].dtype == state["squares"].dtype == torch.float64
        restored = RunningMoments(5, variance)
        restored.load_state_dict(state)
        continued = moments.copy()
        for one in (restored, continued):
            one.update(random_rows(7, 5, seed=3))
        for name, value in restored.state_dict().items():
            assert same_bits(value, continued.state_dict()[name])


def test_state_shares_no_memory():
    moments = RunningMoments(3)
    moments.update(random_rows(5, 3))
    before = moments.copy()
    state = moments.state_dict()
    for value in state.values():
        value.zero_()
    moments.mean.zero_()
    moments.std.zero_()
    assert_equal_moments(moments, before)
    restored = RunningMoments(3)
    state = moments.state_dict()
    restored.load_state_dict(state)
    for value in state.values():
        value.zero_()
    assert_equal_moments(restored, before)
    restored.update(random_rows(2, 3))
    assert_equal_moments(moments, before)


def test_state_of_float32_is_taken_in_as_float64():
    moments = RunningMoments(2)
    moments.load_state_dict(
        {"count": torch.tensor(3), "mean": torch.ones(2), "squares": torch.ones(2)}
    )
    assert moments.mean.dtype == torch.float64 and moments.std.dtype == torch.float64


def test_copies_are_independent():
    moments = RunningMoments(3, "published")
    moments.update(random_rows(5, 3))
    twin, before = moments.copy(), moments.state_dict()
    assert (twin.size, twin.variance, twin.count) == (3, "published", 5)
    twin.update(random_rows(7, 3, seed=1))
    for name, value in moments.state_dict().items():
        assert same_bits(value, before[name])
    kept = twin.state_dict()
    moments.update(random_rows(2, 3, seed=2))
    for name, value in twin.state_dict().items():
        assert same_bits(value, kept[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "state holds ['count', 'squares']; count, mean and squares are needed"),
        ({"extra": torch.zeros(1)}, "state holds ['count', 'extra', 'mean', 'squares']"),
        ({"mean": torch.zeros(4)}, "mean has shape (4,), not (3,)"),
        ({"squares": torch.zeros(1, 3)}, "squares has shape (1, 3), not (3,)"),
    ],
)
def test_state_that_does_not_fit(change, message):
    moments = RunningMoments(3)
    moments.update(random_rows(5, 3))
    before = moments.copy()
    state = {**RunningMoments(3).state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        moments.load_state_dict(state)
    assert_equal_moments(moments, before)


def test_repr_names_what_matters():
    assert repr(RunningMoments(3)) == "RunningMoments(size=3, variance='unbiased', count=0)"
