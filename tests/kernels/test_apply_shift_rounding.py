"""apply_shift: stochastic and compensated rounding against the reference's."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from ops.layouts import random_rows, same_bits
from ops.tolerances import UNIT_ROUNDOFF
from shift_cases import (
    CONFIGS,
    DTYPES,
    FACTORS,
    HALVES,
    by_reference,
    exact_case,
    exact_sum,
    name_of,
    weight_of,
)
from torch import Tensor

from pyeditfast import reference
from pyeditfast.ops import Shift, apply_shift_
from pyeditfast.reference.apply_shift import round_stochastically
from pyeditfast_kernels import apply_shift as kernels

STREAMS = [(0, 127), (1, 128), (2**31, 127), (2**32 + 1, 128), (2**63, 127), (2**64 - 1, 128)]
"""Seeds, and rows that begin with a Philox block or inside one."""

# Stochastic.


@triton.jit
def stochastic_kernel(numbers, uniform, rounded, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    dtype: tl.constexpr = rounded.dtype.element_ty
    result = kernels.round_stochastically(tl.load(numbers + lanes), tl.load(uniform + lanes), dtype)
    tl.store(rounded + lanes, kernels.narrowed(result, dtype))


def stochastically(numbers: Tensor, uniform: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = torch.zeros(numbers.shape, dtype=dtype, device=numbers.device)
    stochastic_kernel[(1,)](numbers, uniform.to(numbers.device), rounded, numbers.numel())
    return rounded.cpu()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_decides_as_the_reference_at_every_magnitude(device, dtype):
    generator = torch.Generator().manual_seed(2)
    exponents = (-20, 9) if dtype == torch.float16 else (-140, 120)
    numbers = random_rows(4096) * 2.0 ** torch.randint(*exponents, (4096,), generator=generator)
    # Some that the dtype holds, some that its smallest numbers round to zero.
    numbers[:100] = numbers[:100].to(dtype).float()
    numbers[100:200] *= 2.0**-10
    numbers[200:203] = torch.tensor([0.0, -0.0, -1.0])
    drawn = torch.rand(5, 4096, generator=generator)
    for uniform in (*drawn, *(torch.full((4096,), u) for u in (0.0, 0.5, 0.75))):
        expected = round_stochastically(numbers, dtype, uniform)
        assert same_bits(stochastically(numbers.to(device), uniform, dtype), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_takes_the_lower_neighbour_where_uniform_is_the_fraction(device, dtype):
    # Half way, a quarter and three quarters of the way, of both signs: exactly on the border.
    step = torch.finfo(dtype).eps
    fraction = torch.tensor([0.5, 0.25, 0.75, 0.0] * 4)
    start = torch.tensor([1.0, -2.0, 0.5, -0.25]).repeat_interleave(4)
    gap = step * torch.tensor([1.0, 1.0, 0.5, 0.125]).repeat_interleave(4)
    numbers = start + gap * fraction
    result = stochastically(numbers.to(device), fraction, dtype)
    assert torch.equal(result.float(), start)
    assert torch.equal(result, round_stochastically(numbers, dtype, fraction))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_keeps_finite_numbers_finite_and_others_as_they_are(device, dtype):
    largest = torch.finfo(dtype).max
    numbers = largest * torch.tensor([1.0, -1.0, 1.0009, -1.0009])
    numbers = torch.cat([numbers, torch.tensor([math.inf, -math.inf, math.nan, math.nan])])
    # The NaN that GPUs make, all bits set.
    numbers[7:].view(torch.int32).fill_(0x7FFFFFFF)
    for u in (0.0, 0.5, 1 - 2.0**-24):
        result = stochastically(numbers.to(device), torch.full((8,), u), dtype)
        assert result[:4].tolist() == [largest, -largest, largest, -largest]
        assert result[4:6].tolist() == [math.inf, -math.inf]
        assert result[6:].isnan().all()


@pytest.mark.parametrize("right", FACTORS, ids=str)
@pytest.mark.parametrize(("seed", "d_in"), STREAMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_takes_the_neighbour_that_the_reference_takes(device, dtype, seed, d_in, right):
    # Sums are exact in float32, so not one decision may differ.
    weight, shift = exact_case(2, 3, 61, d_in, dtype=dtype, right=right, device=device)
    nearest = exact_sum(weight, shift).to(dtype)
    expected, _ = by_reference(weight, shift, "stochastic", seed)
    apply_shift_(weight, shift, "stochastic", seed)
    assert torch.equal(weight.cpu(), expected)
    assert (weight != nearest).double().mean().item() > 0.1


@pytest.mark.parametrize("d_in", [12, 13])
@pytest.mark.parametrize("index", [0, 2**31 - 40, 2**32 - 40, 2**33 + 7, 2**34 - 20, 2**62])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_random_numbers_of_far_elements(device, config, index, d_in):
    dtype = torch.bfloat16
    weight, shift = exact_case(2, 1, 5, d_in, dtype=dtype, right=torch.float32, device=device)
    uniform = reference.random_uniform(9, weight.shape, index).to(device)
    exact = exact_sum(weight, shift)
    expected = round_stochastically(exact.cpu(), torch.bfloat16, uniform.cpu())
    kernels.apply_shift_(
        weight, shift.left, shift.right, "stochastic", 9, None, index, config=config
    )
    assert same_bits(weight.cpu(), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_goes_up_as_often_as_it_should(device, dtype):
    for start, fraction in ((1.0, 0.125), (-3.0, 0.9), (0.0, 0.5)):
        weight = torch.full((100, 100), start, dtype=dtype, device=device)
        gap = torch.finfo(dtype).eps * (2.0 if start == -3.0 else 1.0)
        if start == 0.0:
            gap = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        left = torch.full((1, 100), fraction, device=device)
        right = torch.full((1, 100), gap, device=device)
        apply_shift_(weight, Shift("dual", 1, left=left, right=right), "stochastic", seed=11)
        up = int((weight.double() > start).sum())
        assert up + int((weight == start).sum()) == 10_000
        # Five standard deviations of the binomial distribution.
        assert abs(up - 1e4 * fraction) <= 5 * math.sqrt(1e4 * fraction * (1 - fraction))


# Compensated.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compensated_keeps_what_nearest_loses(device, dtype):
    # Shifts far below half a spacing, fifty times.
    weight = weight_of((1, 17, 33), dtype, device)
    remainder = torch.zeros_like(weight)
    unit = UNIT_ROUNDOFF[dtype]
    weight.abs_().add_(0.02)
    start = weight.double()
    plain = weight.clone()
    left = (2e-3 * unit * random_rows(2, 17, seed=4).clamp(-2, 2)).to(device)
    right = random_rows(2, 33, seed=5).clamp(-2, 2).to(device)
    shift = Shift("dual", 2, left=left, right=right)
    turns = 50
    for _ in range(turns):
        apply_shift_(weight, shift, "compensated", remainder=remainder)
    for _ in range(3):
        apply_shift_(plain, shift)
    assert torch.equal(plain.double(), start)
    change = left.double().mT @ right.double()
    exact = start + turns * change
    # A turn rounds the remainder, at most half a spacing of the weight, to its own digits, of which
    # float16 has none below 2⁻²⁴.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    step = unit * unit * exact.abs().max().item() + smallest / 2
    error = (weight.double() + remainder.double() - exact).abs().max().item()
    assert error <= turns * step
    assert error <= 0.05 * turns * change.abs().max().item()


def test_compensated_float32_is_a_two_sum(device):
    _, shift = exact_case(3, 31, 57, dtype=torch.float32, right=torch.float32, device=device)
    weight = weight_of((3, 31, 57), torch.float32, device)
    remainder = torch.zeros_like(weight)
    exact = exact_sum(weight, shift)
    apply_shift_(weight, shift, "compensated", remainder=remainder)
    assert torch.equal(weight, exact.float())
    assert remainder.any()
    assert torch.equal(weight.double() + remainder.double(), exact)
