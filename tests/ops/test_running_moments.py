"""RunningMoments: exact for any way of feeding it, and what it makes of rows."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out, random_rows, same_bits
from moments import assert_equal_moments, pieces
from tolerances import UNIT_ROUNDOFF, assert_as_accurate, floor, largest_error

from pyeditfast import backend, reference
from pyeditfast.ops import RunningMoments

EPSILON = 2.0**-23

# The exact pooled variance.


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(2, 60),
    size=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    seed=st.integers(0, 2**31),
    mean=st.sampled_from([0.0, 1.0, -1e4]),
    spread=st.sampled_from([1.0, 1e-3, 1e3]),
)
def test_any_cut_gives_the_variance_of_all_rows(n, size, cuts, seed, mean, spread):
    rows = mean + spread * random_rows(n, size, seed=seed, dtype=torch.float64)
    moments = RunningMoments(size)
    for piece in pieces(rows, cuts):
        moments.update(piece)
    variance, average = torch.var_mean(rows, 0)
    # A mean of 1e4 and a spread of 1e-3 leave float64 nine digits of a deviation.
    slack = 100 * UNIT_ROUNDOFF[torch.float64]
    assert moments.count == n
    assert (moments.mean - average).abs().max() <= slack * (abs(mean) + spread)
    assert ((moments.std - variance.sqrt()).abs() <= slack * (abs(mean) + spread)).all()


@pytest.mark.parametrize("cuts", [[], [1], [100, 101, 400], list(range(1, 777, 7))], ids=len)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_plain_float32(dtype, cuts):
    rows = random_rows(777, 31, dtype=dtype, scale=3.0) + 1.0
    moments = RunningMoments(31)
    for piece in pieces(rows, cuts):
        moments.update(piece)
    variance, average = torch.var_mean(rows.double(), 0)
    assert_as_accurate(moments.mean.float(), rows.float().mean(0), average, 777)
    assert_as_accurate(moments.std.float(), rows.float().std(0), variance.sqrt(), 777)


def test_large_mean_and_small_spread():
    # Ten spacings of float32 are all the spread there is.
    rows = 1e4 + 1e-2 * random_rows(4001, 13)
    assert rows.dtype == torch.float32
    exact = rows.double()
    moments = RunningMoments(13)
    for piece in rows.split(400):
        moments.update(piece)
    assert largest_error(moments.mean, exact.mean(0)) <= 1e-12
    assert largest_error(moments.std, exact.std(0)) <= 1e-6
    # Normalizing in float32 rounds the mean to float32, half a spacing at most.
    normalized = (exact - exact.mean(0)) / (exact.std(0) + EPSILON)
    half_spacing = 2.0**-11
    error = (moments.normalize(rows).double() - normalized).abs().max().item()
    assert error <= 1.01 * half_spacing / exact.std(0).min().item() + 1e-5
    assert largest_error(moments.normalize(exact), normalized) <= 1e-6


def test_squares_of_float16_rows_do_not_overflow():
    rows = random_rows(50, 7, scale=2e4).clamp(-6e4, 6e4).half()
    moments = RunningMoments(7)
    moments.update(rows)
    assert largest_error(moments.std, rows.double().std(0)) <= 2 * floor(torch.float32, 50)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e4, 1e-6])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_constant_columns_normalize_to_exactly_zero(dtype, n, value):
    constants = torch.tensor([value, 0.7 * value, 1.3 * value]).to(dtype)
    rows = constants.expand(n, 3)
    moments = RunningMoments(3)
    for _ in range(3):
        moments.update(rows)
        assert torch.equal(moments.normalize(rows), torch.zeros(n, 3))
    assert moments.std.max().item() <= 1e-9 * abs(value)


@pytest.mark.parametrize(
    ("n", "value"),
    [
        (1_071_274, -0.40334352850914),
        (1_087_112, 0.18203648924827576),
        (1_253_411, 0.1919950693845749),
        (1_308_844, -0.9180999994277954),
    ],
)
def test_one_row_in_a_million_that_differs_leaves_a_finite_deviation(n, value):
    # The sum of squares, less what the rounded mean put into it, may come out just below zero.
    rows = torch.full((n, 1), value)
    rows[n // 2] = torch.nextafter(rows[0], torch.tensor([9.0]))
    moments = RunningMoments(1)
    moments.update(rows)
    assert 0.0 <= moments.std.item() <= 1e-9
    assert not moments.normalize(rows[:1]).any()


def test_constant_columns_in_float64():
    rows = torch.tensor([0.1, -3.3], dtype=torch.float64).expand(1001, 2)
    moments = RunningMoments(2)
    moments.update(rows)
    assert moments.normalize(rows).abs().max().item() <= 1e-6


def test_single_rows_drift_nowhere():
    rows = 5.0 + random_rows(3000, 3, dtype=torch.float64)
    moments = RunningMoments(3)
    for row in rows.split(1):
        moments.update(row)
    assert largest_error(moments.mean, rows.mean(0)) <= 1e-13
    assert largest_error(moments.std, rows.std(0)) <= 1e-13


@pytest.mark.parametrize("variance", ["unbiased", "published"])
def test_fewer_than_two_rows_have_no_deviation(variance):
    moments = RunningMoments(2, variance)
    assert moments.count == 0
    assert torch.equal(moments.mean, torch.zeros(2).double())
    assert torch.equal(moments.std, torch.zeros(2).double())
    moments.update(torch.tensor([[3.0, -1.0]]))
    assert moments.count == 1
    assert moments.mean.tolist() == [3.0, -1.0]
    assert torch.equal(moments.std, torch.zeros(2).double())


def test_no_rows_change_nothing():
    moments = RunningMoments(3)
    moments.update(random_rows(5, 3))
    before = moments.state_dict()
    moments.update(torch.zeros(0, 3))
    moments.update(torch.zeros(2, 0, 3))
    moments.update(torch.zeros(0, 3), segments=[])
    for name, value in moments.state_dict().items():
        assert same_bits(value, before[name])


def test_leading_dimensions_are_rows():
    rows = random_rows(2, 3, 7, 5)
    joined, flat = RunningMoments(5), RunningMoments(5)
    joined.update(rows)
    flat.update(rows.reshape(42, 5))
    assert joined.count == 42
    assert_equal_moments(joined, flat)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_are_read_and_not_written(dtype, layout):
    plain = random_rows(3, 19, 7, dtype=dtype)
    rows, storage = lay_out(plain, layout)
    before = storage.clone()
    moments, expected = RunningMoments(7), RunningMoments(7)
    moments.update(rows)
    normalized = moments.normalize(rows)
    expected.update(plain)
    assert_equal_moments(moments, expected, floor(torch.float32, 57))
    assert largest_error(normalized, expected.normalize(plain).double()) <= 1e-5
    assert same_bits(storage, before)


def test_expanded_rows():
    moments, expected = RunningMoments(4), RunningMoments(4)
    row = random_rows(2, 1, 4)
    moments.update(row.expand(2, 9, 4))
    expected.update(row.repeat(1, 9, 1))
    assert_equal_moments(moments, expected, floor(torch.float32, 18))


@pytest.mark.parametrize("variance", ["unbiased", "published"])
def test_parts_side_by_side_are_joined_rows(variance):
    keys, grads = random_rows(2, 30, 7, dtype=torch.bfloat16), random_rows(2, 30, 5, seed=1)
    parts, joined = RunningMoments(12, variance), RunningMoments(12, variance)
    parts.update(keys, grads, segments=[10, 1, 49])
    joined.update(torch.cat([keys.float(), grads], -1), segments=[10, 1, 49])
    assert parts.count == 60
    assert_equal_moments(parts, joined, floor(torch.float32, 60))


@pytest.mark.parametrize("variance", ["unbiased", "published"])
def test_gives_the_same_bits_twice(variance):
    first, second = RunningMoments(61, variance), RunningMoments(61, variance)
    rows = random_rows(257, 61)
    for moments in (first, second):
        moments.update(rows, segments=[100, 57, 100])
    for name, value in first.state_dict().items():
        assert same_bits(value, second.state_dict()[name])
    assert same_bits(first.normalize(rows), second.normalize(rows))


# Normalizing.


@pytest.mark.parametrize("shape", [(9, 7), (1, 7), (2, 3, 4, 7), (0, 7), (3, 0, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize_is_as_accurate_as_plain_torch(dtype, shape):
    moments = RunningMoments(7)
    moments.update(3.0 + random_rows(101, 7, scale=2.0))
    rows = (3.0 + random_rows(*shape, seed=2, scale=2.0)).to(dtype)
    result = moments.normalize(rows)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.dtype == wide
    naive = (rows.to(wide) - moments.mean.to(wide)) / (moments.std.to(wide) + EPSILON)
    exact = (rows.double() - moments.mean) / (moments.std + EPSILON)
    assert_as_accurate(result, naive, exact, 1)


def test_normalized_rows_have_mean_zero_and_deviation_one():
    rows = 100.0 + 5.0 * random_rows(500, 3, dtype=torch.float64)
    moments = RunningMoments(3)
    moments.update(rows)
    normalized = moments.normalize(rows)
    assert normalized.mean(0).abs().max().item() <= 1e-12
    assert largest_error(normalized.std(0), torch.ones(3).double()) <= 1e-6


def test_epsilon_is_that_of_float32_in_every_dtype():
    moments = RunningMoments(1)
    # Mean 0, standard deviation 0: only eps is left.
    moments.update(torch.zeros(2, 1))
    for dtype in (torch.float32, torch.float64):
        row = torch.full((1, 1), 2.0**-23, dtype=dtype)
        assert moments.normalize(row).item() == 1.0


def test_mean_and_scale_are_what_normalize_uses():
    moments = RunningMoments(5)
    moments.update(random_rows(50, 5, scale=2.0) + 1.0)
    rows = random_rows(9, 5, seed=1)
    mean, scale = moments.mean_and_scale(torch.device("cpu"))
    assert mean.dtype == scale.dtype == torch.float32
    assert torch.equal((rows - mean) * scale, moments.normalize(rows))
    exact = 1.0 / (moments.std + EPSILON)
    assert largest_error(scale, exact) <= UNIT_ROUNDOFF[torch.float32]


# Other backends, and what is refused.


@pytest.mark.parametrize("variance", ["unbiased", "published"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_backend_is_the_float64_formula(dtype, variance):
    rows = 50.0 + random_rows(40, 7, dtype=dtype)
    moments, expected = RunningMoments(7, variance), reference.RunningMoments(7, variance)
    expected.update(rows, segments=[11, 1, 28])
    with backend("reference"):
        moments.update(rows, segments=[11, 1, 28])
        normalized = moments.normalize(rows)
    assert_equal_moments(moments, expected, 1e-14)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert normalized.dtype == wide
    exact = expected.normalize(rows.double())
    assert largest_error(normalized, exact) <= 2 * UNIT_ROUNDOFF[wide] + 1e-12


def test_backend_without_this_op():
    moments = RunningMoments(2)
    with backend("cpp"), pytest.raises(ValueError, match="running_moments has no usable backend"):
        moments.update(torch.ones(3, 2))
    assert moments.count == 0


@pytest.mark.parametrize(
    ("size", "variance", "message"),
    [
        (0, "unbiased", "size is 0; at least one feature is needed"),
        (-3, "unbiased", "size is -3"),
        (3, "biased", "variance is 'biased'; choose one of unbiased, published"),
    ],
)
def test_settings_that_make_no_sense(size, variance, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RunningMoments(size, variance)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((), ValueError, "update needs at least one tensor of rows"),
        (([[1.0]],), TypeError, "rows is a list"),
        ((torch.ones(2, 5, dtype=torch.int64),), TypeError, "rows has dtype torch.int64"),
        ((torch.ones(5),), ValueError, "rows has shape (5,)"),
        ((torch.ones(2, 4),), ValueError, "rows of shape (2, 4) do not make [..., n, 5]"),
        (
            (torch.ones(2, 3), torch.ones(2, 3)),
            ValueError,
            "rows of shape (2, 3), (2, 3) do not make [..., n, 5]",
        ),
        (
            (torch.ones(2, 3), torch.ones(3, 2)),
            ValueError,
            "rows of shape (2, 3), (3, 2) do not make [..., n, 5]",
        ),
    ],
)
def test_rows_that_do_not_fit(parts, error, message):
    moments = RunningMoments(5)
    with pytest.raises(error, match=re.escape(message)):
        moments.update(*parts)
    assert moments.count == 0


def test_rows_that_cannot_be_normalized():
    moments = RunningMoments(3)
    with pytest.raises(ValueError, match=re.escape("rows have shape (2, 4); [..., 3] is needed")):
        moments.normalize(torch.ones(2, 4))
    with pytest.raises(TypeError, match=re.escape("rows has dtype torch.int64")):
        moments.normalize(torch.ones(2, 3, dtype=torch.int64))
