"""apply_shift: the kernel against ``W + Aᵀ K`` in float64, rounded once."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, empty_storage, random_rows, same_bits, view_of
from ops.tolerances import UNIT_ROUNDOFF
from shift_cases import (
    CASES,
    CONFIGS,
    DTYPES,
    FACTORS,
    STEP,
    assert_nearest,
    assert_within_slack,
    by_reference,
    exact_case,
    exact_sum,
    make_shift,
    name_of,
    weight_of,
)
from truncation import truncate_dots

from pyeditfast.ops import Shift, apply_shift_
from pyeditfast_kernels import apply_shift as kernels
from pyeditfast_kernels.launch import interprets

# [..., rank, d_out, d_in]
SIZES = [
    (1, 1, 1),
    (1, 7, 1),
    (3, 1, 7),
    (5, 13, 31),
    (33, 64, 128),
    (40, 101, 203),
    (2, 4, 17, 11),
    (1, 5, 16, 32),
    (3, 31, 80, 96),
    (2, 3, 2, 5, 7),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("right", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_is_the_rounded_exact_sum(device, dtype, right, sizes):
    weight, shift = weight_of(sizes, dtype, device), make_shift(*sizes, device=device, right=right)
    before = weight.clone()
    factors = shift.left.clone(), shift.right.clone()
    assert apply_shift_(weight, shift) is weight
    assert_nearest(weight, before, shift)
    assert same_bits(shift.left, factors[0]) and same_bits(shift.right, factors[1])


@pytest.mark.parametrize("right", FACTORS, ids=str)
@pytest.mark.parametrize(("dtype", "rounding"), CASES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_every_configuration(device, config, dtype, rounding, right):
    # Four tiles; sums are exact, so every configuration has the numbers of the reference.
    sizes = (1, 33, config.sizes["BLOCK_OUT"] + 3, config.sizes["BLOCK_IN"] + 5)
    weight, shift = exact_case(*sizes, dtype=dtype, right=right, device=device)
    seed = 3 if rounding == "stochastic" else None
    remainder = torch.zeros_like(weight) if rounding == "compensated" else None
    expected = by_reference(weight, shift, rounding, seed, remainder)
    kernels.apply_shift_(weight, shift.left, shift.right, rounding, seed, remainder, config=config)
    assert torch.equal(weight.cpu(), expected[0])
    if remainder is not None:
        assert torch.equal(remainder.cpu(), expected[1])


@settings(deadline=None, max_examples=25)
@given(
    modules=st.integers(1, 3),
    rank=st.integers(1, 70),
    d_out=st.integers(1, 70),
    d_in=st.integers(1, 140),
    config=st.sampled_from(CONFIGS),
    dtype=st.sampled_from(DTYPES),
    right=st.sampled_from(FACTORS),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(device, modules, rank, d_out, d_in, config, dtype, right, layout):
    sizes = (modules, rank, d_out, d_in)
    before, shift = weight_of(sizes, dtype, device), make_shift(*sizes, device=device, right=right)
    weight = view_of(empty_storage(before.shape, dtype, layout).to(device), layout)
    weight.copy_(before)
    kernels.apply_shift_(weight, shift.left, shift.right, "nearest", config=config)
    assert_within_slack(weight, before, shift)


@pytest.mark.parametrize("right", FACTORS, ids=str)
def test_a_float32_weight_is_as_accurate_as_plain_float32(device, right):
    sizes = (400, 31, 57)
    shift = make_shift(*sizes, device=device, right=right, scale=1.0)
    weight = torch.zeros(31, 57, device=device)
    apply_shift_(weight, shift)
    exact = exact_sum(torch.zeros_like(weight), shift).cpu()
    plain = shift.left.cpu().mT @ shift.right.cpu().float()
    error, yardstick = ((part.cpu() - exact).abs().max() for part in (weight, plain))
    floor = UNIT_ROUNDOFF[torch.float32] * (1 + math.sqrt(400)) * exact.abs().max()
    assert error <= 2 * yardstick + floor


@pytest.mark.parametrize("right", FACTORS, ids=str)
def test_a_product_keeps_the_digits_of_float32(device, right):
    # Rank 1: without any one of the products of parts some entries are off by 2⁻¹⁸.
    shift = make_shift(1, 31, 57, device=device, right=right)
    weight = torch.zeros(31, 57, device=device)
    exact = exact_sum(weight, shift)
    error = ((apply_shift_(weight, shift) - exact) / exact).abs().max().item()
    assert error <= 3 * UNIT_ROUNDOFF[torch.float32]
    # What the middle and the low parts bring shows in a bfloat16 weight that holds the high ones.
    weight = exact.to(torch.bfloat16)
    before = weight.clone()
    shift = Shift("dual", 1, left=-shift.left, right=shift.right)
    assert_within_slack(apply_shift_(weight, shift), before, shift)


@pytest.mark.parametrize("right", FACTORS, ids=str)
def test_truncating_tensor_cores(device, right, monkeypatch):
    if interprets():
        truncate_dots(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    left = (1 + torch.rand(6000, 5, generator=generator)).to(device)
    keys = (1 + torch.rand(6000, 7, generator=generator)).to(device, right)
    weight = torch.zeros(5, 7, device=device)
    apply_shift_(weight, Shift("dual", 6000, left=left, right=keys))
    exact = left.double().mT @ keys.double()
    error = ((weight - exact).abs() / exact).max().item()
    assert error <= UNIT_ROUNDOFF[torch.float32] * (1 + math.sqrt(6000)) / 4


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rounds_once(device, rounding):
    # 1 + 2⁻⁸ lies half way between two bfloat16 values. Rounding the shift to bfloat16 first, or
    # adding its two halves one after the other, loses the 2⁻²⁰ that decides.
    weight = torch.ones(1, 4, dtype=torch.bfloat16, device=device)
    left = torch.tensor([[2.0**-8], [2.0**-20]], device=device)
    shift = Shift("dual", 2, left=left, right=torch.ones(2, 4, device=device))
    if rounding == "nearest":
        apply_shift_(weight, shift)
        assert weight.tolist() == [[1 + 2.0**-7] * 4]
    else:
        apply_shift_(weight, shift, rounding, seed=0)
        assert set(weight.flatten().tolist()) <= {1.0, 1 + 2.0**-7}


def test_nearest_rounds_ties_to_even(device):
    weight = torch.tensor([[1.0, 1 + 2.0**-7]], dtype=torch.bfloat16, device=device)
    left = torch.full((1, 1), 2.0**-8, device=device)
    apply_shift_(weight, Shift("dual", 1, left=left, right=torch.ones(1, 2, device=device)))
    assert weight.tolist() == [[1.0, 1 + 2.0**-6]]


@pytest.mark.parametrize("left", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("right", [torch.float64, torch.float16], ids=str)
def test_factors_of_other_dtypes(device, left, right):
    weight, shift = exact_case(3, 5, 7, dtype=torch.float32, right=torch.float32, device=device)
    numbers = (shift.left / STEP).clamp(-99, 99)
    shift = Shift("dual", 3, left=numbers.to(left), right=shift.right.to(right))
    weight.fill_(1.0)
    apply_shift_(weight, shift)
    assert torch.equal(weight.double(), 1 + shift.left.double().mT @ shift.right.double())


# Magnitudes.


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_numbers_below_the_smallest_normal_one(device, rounding):
    # In bfloat16 those below 2⁻¹²⁶, which the interpreter's own conversion spoils.
    weight = random_rows(7, 9, scale=2.0**-130).to(device, torch.bfloat16)
    left = torch.full((1, 7), 2.0**-100, device=device)
    shift = Shift("dual", 1, left=left, right=torch.full((1, 9), 2.0**-34, device=device))
    seed = 4 if rounding == "stochastic" else None
    expected, _ = by_reference(weight, shift, rounding, seed)
    assert same_bits(apply_shift_(weight, shift, rounding, seed).cpu(), expected)


def test_the_largest_numbers(device):
    # Above the largest bfloat16, and a product that is not large.
    left = torch.tensor([[3.4028235e38, -3.4e38]], device=device)
    shift = Shift("dual", 1, left=left, right=torch.full((1, 3), 1e-30, device=device))
    weight = torch.ones(2, 3, device=device)
    apply_shift_(weight, shift)
    exact = 1 + left.double().mT @ shift.right.double()
    assert bool(((weight - exact).abs() <= 1e-6 * exact.abs()).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dominant_direction(device, dtype):
    sizes = (50, 31, 57)
    shift = make_shift(*sizes, device=device, scale=1e-6)
    shift.right[:, 5] = 1e4
    weight = weight_of(sizes, dtype, device)
    before = weight.clone()
    apply_shift_(weight, shift)
    assert_nearest(weight, before, shift)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("dtype", "rounding"), CASES, ids=str)
def test_what_is_not_finite_in_a_weight_stays(device, dtype, rounding):
    weight = torch.ones(3, 4, dtype=dtype, device=device)
    weight[0, 0], weight[1, 1], weight[2, 2] = math.nan, math.inf, -math.inf
    left, right = torch.full((1, 3), 1e-3, device=device), torch.ones(1, 4, device=device)
    seed = 1 if rounding == "stochastic" else None
    remainder = torch.zeros_like(weight) if rounding == "compensated" else None
    kernels.apply_shift_(
        weight[None],
        left[None],
        right[None],
        rounding,
        seed,
        None if remainder is None else remainder[None],
    )
    assert weight[0, 0].isnan() and weight[1, 1] == math.inf and weight[2, 2] == -math.inf
    assert int(weight.isfinite().sum()) == 9


# Bits.


@pytest.mark.parametrize("right", FACTORS, ids=str)
@pytest.mark.parametrize(("dtype", "rounding"), CASES, ids=str)
def test_gives_the_same_bits_twice(device, dtype, rounding, right):
    sizes = (2, 33, 70, 133)
    shift = make_shift(*sizes, device=device, right=right)
    seed = 5 if rounding == "stochastic" else None
    results = []
    for _ in range(2):
        weight = weight_of(sizes, dtype, device)
        remainder = torch.zeros_like(weight) if rounding == "compensated" else None
        apply_shift_(weight, shift, rounding, seed, remainder=remainder)
        results.append(torch.cat([weight, weight if remainder is None else remainder]))
    assert same_bits(*results)


def test_a_module_has_the_same_bits_in_any_company(device):
    sizes = (3, 40, 70, 133)
    shift = make_shift(*sizes, device=device)
    together, alone = (weight_of(sizes, torch.bfloat16, device) for _ in range(2))
    apply_shift_(together, shift)
    for module in range(3):
        part = Shift("dual", 40, left=shift.left[module], right=shift.right[module])
        apply_shift_(alone[module], part)
    assert same_bits(together, alone)


def test_configurations():
    assert kernels.choose_config(torch.bfloat16, True) is kernels.SQUARE
    assert kernels.choose_config(torch.float32, True) is kernels.NARROW
    assert kernels.choose_config(torch.float32, False) is kernels.FINE


def test_float64_weights_and_primal_shifts_are_refused(device):
    weight = torch.ones(3, 4, dtype=torch.float64, device=device)
    message = "not used: its kernels take bfloat16, float16 and float32, not torch.float64"
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_shift_(weight, make_shift(2, 3, 4, device=device))
    primal = Shift("primal", 3, matrix=torch.ones(3, 4, device=device))
    with pytest.raises(ValueError, match="not used: its kernel takes dual shifts"):
        apply_shift_(weight.float(), primal)
