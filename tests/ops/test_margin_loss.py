"""margin_loss: far from the main memory within scope, near it without."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import same_bits

from pyeditfast.reference import margin_loss
from pyeditfast.reference.margin_loss import mean_of_positive

# Whole gaps and margins meet exactly.
GAPS = st.floats(0, 100) | st.integers(0, 12).map(float)
MARGINS = st.tuples(GAPS, GAPS, GAPS)


def mean_of_positive_by_loop(terms: list[float]) -> float:
    positive = [term for term in terms if term > 0]
    return sum(positive) / len(positive) if positive else 0.0


def by_loop(in_gaps: list[float], out_gap: float, margins: tuple[float, float, float]) -> float:
    alpha, beta, gamma = margins
    return (
        mean_of_positive_by_loop([out_gap - gap + gamma for gap in in_gaps])
        + mean_of_positive_by_loop([out_gap - alpha])
        + mean_of_positive_by_loop([beta - gap for gap in in_gaps])
    )


@given(in_gaps=st.lists(GAPS, max_size=11), out_gap=GAPS, margins=MARGINS)
def test_is_the_loop(in_gaps, out_gap, margins):
    inside = torch.tensor(in_gaps, dtype=torch.float64)
    outside = torch.tensor(out_gap, dtype=torch.float64)
    before = inside.clone(), outside.clone()
    loss = margin_loss(inside, outside, margins)
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(by_loop(in_gaps, out_gap, margins), rel=1e-13, abs=1e-13)
    assert same_bits(inside, before[0]) and same_bits(outside, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_part_averages_its_positive_terms_alone(dtype):
    inside = torch.tensor([1.0, 8.0, 30.0], dtype=dtype)
    outside = torch.tensor(7.0, dtype=dtype)
    # 7 − 1 + 10 and 7 − 8 + 10 of three; 7 − 5; 20 − 1 and 20 − 8 of three.
    loss = margin_loss(inside, outside, (5.0, 20.0, 10.0))
    assert loss.dtype == dtype
    assert loss.item() == (16 + 9) / 2 + 2 + (19 + 12) / 2


def test_gaps_that_keep_their_margins_cost_nothing():
    inside = torch.tensor([30.0, 25.0], requires_grad=True)
    outside = torch.tensor(1.0, requires_grad=True)
    loss = margin_loss(inside, outside, (5.0, 20.0, 10.0))
    assert loss.item() == 0.0
    gradients = torch.autograd.grad(loss, (inside, outside))
    assert [gradient.tolist() for gradient in gradients] == [[0.0, 0.0], 0.0]


def test_terms_of_zero_are_not_counted():
    # Of 20 − 20 and 20 − 10 the second is positive.
    inside = torch.tensor([20.0, 10.0], requires_grad=True)
    outside = torch.tensor(0.0)
    loss = margin_loss(inside, outside, (5.0, 20.0, 0.0))
    assert loss.item() == 10.0
    (gradient,) = torch.autograd.grad(loss, inside)
    assert gradient.tolist() == [0.0, -1.0]


@given(
    in_gaps=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    out_gap=st.integers(0, 40),
    margins=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)),
)
def test_gradients_are_the_shares_of_the_positive_terms(in_gaps, out_gap, margins):
    # Halves keep every term off zero, where there is a choice of gradients.
    alpha, beta, gamma = (margin + 0.5 for margin in margins)
    apart = [gap for gap in in_gaps if out_gap - gap + gamma > 0]
    far = [gap for gap in in_gaps if beta - gap > 0]
    expected = [
        -(1 / len(apart) if gap in apart else 0.0) - (1 / len(far) if gap in far else 0.0)
        for gap in in_gaps
    ]
    inside = torch.tensor(in_gaps, dtype=torch.float64, requires_grad=True)
    outside = torch.tensor(float(out_gap), dtype=torch.float64, requires_grad=True)
    loss = margin_loss(inside, outside, (alpha, beta, gamma))
    result = torch.autograd.grad(loss, (inside, outside))
    assert result[0].tolist() == pytest.approx(expected, abs=1e-14)
    assert result[1].item() == pytest.approx((len(apart) > 0) + (out_gap > alpha), abs=1e-14)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_nan_gap_is_a_nan_loss(where):
    # The editor undoes a step whose loss is NaN, so none may be averaged away.
    inside = torch.tensor([1.0, math.nan if where == "inside" else 2.0])
    outside = torch.tensor(math.nan if where == "outside" else 3.0)
    assert margin_loss(inside, outside, (5.0, 20.0, 10.0)).isnan()


def test_margins_out_of_reach_switch_the_loss_off():
    assert margin_loss(torch.tensor([3.0]), torch.tensor(9.0), (1e9, 0.0, -1e9)).item() == 0.0


@given(st.lists(st.floats(-100, 100), max_size=9))
def test_mean_of_positive_is_the_loop(terms):
    result = mean_of_positive(torch.tensor(terms, dtype=torch.float64))
    assert result.item() == pytest.approx(mean_of_positive_by_loop(terms), rel=1e-13)


def test_gives_the_same_bits_twice():
    inside = 30 * torch.rand(101, generator=torch.Generator().manual_seed(0))
    outside = torch.tensor(7.7)
    results = [margin_loss(inside, outside, (5.0, 20.0, 10.0)) for _ in range(2)]
    assert same_bits(*results)
