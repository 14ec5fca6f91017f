"""apply_shift_: stochastic rounding is unbiased, compensated rounding loses nothing."""

from __future__ import annotations

import math

import pytest
import torch
from layouts import DTYPES, random_rows, same_bits
from shifts import (
    HALVES,
    dense_shift,
    every_value,
    exact_neighbours,
    exact_sum,
    float32_slack,
    half_a_spacing,
    make_shift,
    weight_of,
)
from tolerances import UNIT_ROUNDOFF

from pyeditfast import reference
from pyeditfast.ops import apply_shift_

# Stochastic.


@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_takes_one_of_the_two_neighbours(dtype, form):
    sizes = (3, 61, 127)
    # Over zero, below the smallest normal number, and across powers of two.
    weight = weight_of(sizes, dtype) * torch.logspace(-6, 2, 127).to(dtype)
    shift = make_shift(form, *sizes, scale=1e-4)
    before = weight.clone()
    apply_shift_(weight, shift, "stochastic", seed=3)
    exact, slack = exact_sum(before, shift), float32_slack(before, shift)
    low, _ = exact_neighbours(exact - slack, dtype)
    _, high = exact_neighbours(exact + slack, dtype)
    assert bool(((low <= weight.double()) & (weight.double() <= high)).all())
    # Where the slack reaches no representable number there are exactly two neighbours.
    below, above = exact_neighbours(exact, dtype)
    clear = (low == below) & (high == above)
    assert clear.double().mean().item() >= 0.99
    taken = weight.double()[clear]
    assert bool(((taken == below[clear]) | (taken == above[clear])).all())
    assert bool((taken == below[clear]).any()) and bool((taken == above[clear]).any())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_keeps_what_the_dtype_holds(dtype):
    weight = torch.tensor([[1.0, -0.5, 0.0, 2.0**-14]], dtype=dtype)
    shift = dense_shift(torch.tensor([[0.25, 1.0, 2.0**-14, -(2.0**-14)]]))
    for seed in range(50):
        current = weight.clone()
        apply_shift_(current, shift, "stochastic", seed)
        assert current.tolist() == [[1.25, 0.5, 2.0**-14, 0.0]]


@pytest.mark.parametrize("fraction", [0.01, 0.125, 0.5, 0.9])
@pytest.mark.parametrize("start", [1.0, -1.0, 0.02, 0.0, -3.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_goes_up_as_often_as_it_should(dtype, start, fraction):
    rounded = torch.tensor(start, dtype=dtype)
    values = every_value(dtype)
    above = values[values > rounded.double()][0]
    gap = (above - rounded.double()).item()
    count = 40_000
    weight = rounded.expand(200, 200).clone()
    apply_shift_(weight, dense_shift(torch.full((200, 200), fraction * gap)), "stochastic", seed=11)
    went_up = int((weight.double() == above).sum())
    assert went_up + int((weight == rounded).sum()) == count
    # Five standard deviations of the binomial distribution.
    deviation = math.sqrt(count * fraction * (1 - fraction))
    assert abs(went_up - count * fraction) <= 5 * deviation


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_is_unbiased_on_random_weights(dtype):
    sizes = (3, 200, 301)
    weight, shift = weight_of(sizes, dtype), make_shift("primal", *sizes, scale=1e-5)
    before = weight.clone()
    exact = exact_sum(before, shift)
    low, high = exact_neighbours(exact, dtype)
    variance = ((exact - low) * (high - exact)).sum().item()
    apply_shift_(weight, shift, "stochastic", seed=2)
    bias = (weight.double() - exact).sum().item()
    slack = float32_slack(before, shift).sum().item()
    assert abs(bias) <= 5 * math.sqrt(variance) + slack
    # Nearest is biased here: it loses nearly every shift.
    nearest = apply_shift_(before.clone(), dense_shift(shift.matrix.abs()))
    lost = (nearest.double() - before.double() - shift.matrix.abs().double()).sum().item()
    assert abs(lost) > 5 * math.sqrt(variance) + slack


def test_stochastic_drift_follows_the_exact_sum():
    # Ten thousandths of a spacing, a thousand times over: nearest would stay at 1.
    weight = torch.ones(100, 100, dtype=torch.bfloat16)
    step = 2.0**-7 / 1000
    for seed in range(1000):
        apply_shift_(weight, dense_shift(torch.full((100, 100), step)), "stochastic", seed)
    # The mean of 10,000 walks of 1,000 steps that go up by one spacing one time in a thousand.
    deviation = 2.0**-7 * math.sqrt(1000 * 1e-3) / 100
    assert abs(weight.double().mean().item() - (1 + 2.0**-7)) <= 5 * deviation


def test_stochastic_is_reproduced_by_its_seed():
    sizes = (3, 31, 57)
    shift = make_shift("dual", *sizes, scale=1e-5)
    results = []
    for seed in (1, 1, 2, 2**64 - 1):
        results.append(
            apply_shift_(weight_of(sizes, torch.bfloat16), shift, "stochastic", seed=seed)
        )
    assert same_bits(results[0], results[1])
    assert not same_bits(results[0], results[2])
    assert not same_bits(results[2], results[3])


def test_stochastic_items_of_a_batch_are_rounded_independently():
    weight = torch.ones(2, 40, 50, dtype=torch.bfloat16)
    apply_shift_(weight, dense_shift(torch.full((2, 40, 50), 2.0**-8)), "stochastic", seed=1)
    assert not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_equals_the_reference_to_the_bit(dtype):
    # Sums that float32 holds exactly, so that both round the same numbers.
    generator = torch.Generator().manual_seed(8)
    weight = torch.randint(-64, 65, (2, 13, 31), generator=generator).to(dtype) / 64
    value = torch.randint(-4096, 4097, (2, 13, 31), generator=generator) * 2.0**-20
    expected = reference.apply_shift_(weight.clone(), dense_shift(value), "stochastic", 4)
    assert same_bits(apply_shift_(weight, dense_shift(value), "stochastic", 4), expected)


# Compensated.


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compensated_keeps_a_thousand_shifts_that_nearest_loses(dtype):
    steps = 1000
    weight = random_rows(7, 31, dtype=dtype, scale=0.02).abs() + 0.02
    remainder, nearest = torch.zeros_like(weight), weight.clone()
    spacing = torch.finfo(dtype).eps * 2.0**-6
    before, exact = weight.clone(), weight.double()
    for step in range(steps):
        value = random_rows(7, 31, seed=step).abs().clamp(0.1, 3.0) * (spacing / 20)
        exact += value.double()
        apply_shift_(weight, dense_shift(value), "compensated", remainder=remainder)
        apply_shift_(nearest, dense_shift(value))
    assert same_bits(nearest, before)
    assert (exact - nearest.double()).min().item() > 20 * spacing
    # A step rounds the remainder, which is at most half a spacing of a weight below 0.25, to its
    # own dtype, and the sum to float32.
    assert exact.max().item() < 0.25
    largest_remainder = torch.finfo(dtype).eps * 2.0**-3 / 2
    per_step = half_a_spacing(largest_remainder, dtype) + UNIT_ROUNDOFF[torch.float32] * 0.25
    error = (weight.double() + remainder.double() - exact).abs().max().item()
    assert error <= steps * per_step
    # That bound is loose; on random shifts the errors cancel.
    assert error <= 2 * spacing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compensated_sum_loses_nothing_in_one_step(dtype):
    sizes = (3, 2, 13, 31)
    weight, shift = weight_of(sizes, dtype), make_shift("primal", *sizes)
    remainder = torch.zeros_like(weight)
    exact = exact_sum(weight, shift)
    apply_shift_(weight, shift, "compensated", remainder=remainder)
    # The rounding of the remainder, and for 16-bit weights that of the float32 sum.
    slack = half_a_spacing(remainder.double().abs(), dtype)
    if dtype in HALVES:
        slack = slack + UNIT_ROUNDOFF[torch.float32] * exact.abs()
    error = (weight.double() + remainder.double() - exact).abs()
    assert bool((error <= slack).all())
    assert bool((weight == exact.to(dtype)).double().mean() >= 0.999)


def test_compensated_float32_keeps_what_a_float32_sum_loses():
    weight, remainder = torch.ones(2, 3), torch.zeros(2, 3)
    for _ in range(1000):
        apply_shift_(
            weight, dense_shift(torch.full((2, 3), 1e-10)), "compensated", remainder=remainder
        )
    assert torch.equal(weight + torch.zeros(()), weight)
    total = weight.double() + remainder.double()
    assert (total - (1 + 1e-7)).abs().max().item() <= 1000 * 2.0**-24 * 1e-7


def test_compensated_adds_the_remainder_back():
    weight = torch.ones(1, 3, dtype=torch.bfloat16)
    remainder = torch.tensor([[2.0**-8, 2.0**-9, 0.0]], dtype=torch.bfloat16)
    apply_shift_(
        weight, dense_shift(torch.full((1, 3), 2.0**-9)), "compensated", remainder=remainder
    )
    assert weight.tolist() == [[1 + 2.0**-7, 1.0, 1.0]]
    assert remainder.tolist() == [[-(2.0**-9), 2.0**-8, 2.0**-9]]


def test_compensated_never_rounds_down_at_the_weights_expense():
    # Up and down again by the same amounts: nothing is left.
    weight = random_rows(5, 7, dtype=torch.bfloat16, scale=0.02)
    before, remainder = weight.clone(), torch.zeros_like(weight)
    value = random_rows(5, 7, seed=1).sign() * 2.0**-14
    for sign in (1, 1, 1, 1, -1, -1, -1, -1):
        apply_shift_(weight, dense_shift(sign * value), "compensated", remainder=remainder)
    assert (weight.double() + remainder.double() - before.double()).abs().max() <= 8 * 2.0**-23
