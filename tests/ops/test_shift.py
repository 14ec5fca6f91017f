"""Shift: the two forms of ``Δᵀ``, and a bound of its entries that costs no dense matrix."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import random_rows

from pyeditfast.ops import Shift


@pytest.mark.parametrize(
    ("form", "parts"),
    [
        ("dual", {}),
        ("dual", {"left": torch.ones(1, 2)}),
        ("dual", {"right": torch.ones(1, 2)}),
        ("dual", {"left": torch.ones(1, 2), "right": torch.ones(1, 2), "matrix": torch.ones(2, 2)}),
        ("primal", {}),
        ("primal", {"matrix": torch.ones(2, 2), "left": torch.ones(1, 2)}),
        ("primal", {"matrix": torch.ones(2, 2), "right": torch.ones(1, 2)}),
        ("primal", {"left": torch.ones(1, 2), "right": torch.ones(1, 2)}),
    ],
)
def test_shift_needs_the_parts_of_its_form(form, parts):
    message = "a dual Shift holds left and right, a primal one holds matrix"
    with pytest.raises(ValueError, match=message):
        Shift(form, 1, **parts)


@pytest.mark.parametrize("form", ["auto", "low-rank", ""])
def test_shift_has_two_forms(form):
    with pytest.raises(ValueError, match=re.escape(f"form is {form!r}, not 'dual' or 'primal'")):
        Shift(form, 1, matrix=torch.ones(2, 2))


def test_shift_cannot_be_changed():
    shift = Shift("primal", 1, matrix=torch.ones(2, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        shift.rank = 2


def test_shift_of_low_rank_is_a_product():
    left, right = random_rows(2, 3, 5), random_rows(2, 3, 7, seed=1)
    shift = Shift("dual", 3, left=left, right=right)
    assert shift.shape == (2, 5, 7)
    assert shift.device == torch.device("cpu")
    assert torch.equal(shift.dense(), left.mT @ right)


def test_dense_shift_is_its_matrix():
    matrix = random_rows(5, 7)
    shift = Shift("primal", 5, matrix=matrix)
    assert shift.shape == (5, 7)
    assert shift.device == torch.device("cpu")
    assert shift.dense() is matrix


@settings(deadline=None, max_examples=150)
@given(
    lead=st.sampled_from([(), (2,), (2, 3)]),
    sizes=st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 6)),
    seed=st.integers(0, 2**31),
    left_scale=st.integers(-18, 18),
    right_scale=st.integers(-18, 18),
    parallel=st.booleans(),
)
def test_bound_is_never_below_the_largest_entry(
    lead, sizes, seed, left_scale, right_scale, parallel
):
    rank, d_out, d_in = sizes
    left = random_rows(*lead, rank, d_out, seed=seed, scale=10.0**left_scale)
    right = random_rows(*lead, rank, d_in, seed=seed + 1, scale=10.0**right_scale)
    if parallel and d_out and d_in:
        # Cauchy-Schwarz with equality.
        right[..., :1] = left[..., :1]
    exact = left.double().mT @ right.double()
    dual = Shift("dual", rank, left=left, right=right)
    primal = Shift("primal", min(sizes), matrix=exact.float())
    largest = exact.abs().max().item() if exact.numel() else 0.0
    bound = dual.largest_entry_bound()
    assert bound.dtype == torch.float64 and bound.shape == ()
    assert bound.item() >= largest * (1 - 1e-14)
    assert primal.largest_entry_bound().item() == (
        exact.float().abs().max().item() if exact.numel() else 0.0
    )
    assert primal.largest_entry_bound().dtype == torch.float64


def test_bound_of_rank_one_is_the_largest_entry():
    left, right = torch.tensor([[3.0, -4.0]]), torch.tensor([[0.5, 1.0, -8.0]])
    assert Shift("dual", 1, left=left, right=right).largest_entry_bound().item() == 32.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["left", "right", "matrix"])
def test_bound_is_not_finite_where_the_shift_is_not(where, value):
    parts = {"left": torch.zeros(2, 3), "right": torch.zeros(2, 4)}
    if where == "matrix":
        parts = {"matrix": torch.zeros(3, 4)}
    parts[where][1, 2] = value
    shift = Shift("primal" if where == "matrix" else "dual", 2, **parts)
    assert not shift.largest_entry_bound().item() < float("inf")
