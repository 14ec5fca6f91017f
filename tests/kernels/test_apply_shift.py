"""apply_shift: the kernel against ``W + Aᵀ K`` in float64, rounded once."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
import triton
import triton.language as tl
from far_memory import Addresses, FarTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layouts import LAYOUTS, bits, empty_storage, random_rows, same_bits, view_of
from ops.tolerances import UNIT_ROUNDOFF
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from truncation import truncate_dots

from pyeditfast import reference
from pyeditfast.ops import Shift, apply_shift_
from pyeditfast.reference.apply_shift import round_stochastically
from pyeditfast_kernels import apply_shift as kernels
from pyeditfast_kernels.launch import Config, interprets

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALVES = DTYPES[:2]
FACTORS = (torch.bfloat16, torch.float32)

CASES = [(dtype, rounding) for dtype in DTYPES for rounding in ("nearest", "compensated")]
CASES += [(dtype, "stochastic") for dtype in HALVES]

CONFIGS = (kernels.SQUARE, kernels.NARROW, kernels.FINE)

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


def name_of(value: object) -> str:
    return value.name if isinstance(value, Config) else str(value)


def make_shift(
    *sizes: int, device: torch.device, right: torch.dtype = torch.float32, scale: float = 1e-3
) -> Shift:
    """Return a random shift for a weight ``[..., d_out, d_in]``."""
    *lead, rank, d_out, d_in = sizes
    left = random_rows(*lead, rank, d_out, seed=1, scale=scale).to(device)
    keys = random_rows(*lead, rank, d_in, seed=2).to(device, right)
    return Shift("dual", rank, left=left, right=keys)


def weight_of(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    *lead, _, d_out, d_in = sizes
    return random_rows(*lead, d_out, d_in, scale=0.02).to(device, dtype)


def exact_sum(weight: Tensor, shift: Shift) -> Tensor:
    return weight.double() + shift.left.double().mT @ shift.right.double()


def slack_of(weight: Tensor, shift: Shift) -> Tensor:
    """Return how far a float32 sum may be from the exact one, element by element.

    The classical bound of a sum of twice the rank, for additions that cut off instead of rounding,
    as tensor cores do, and one rounding of the sum with the weight.
    """
    products = shift.left.double().abs().mT @ shift.right.double().abs()
    unit = UNIT_ROUNDOFF[torch.float32]
    return unit * ((2 * shift.rank + 4) * products + exact_sum(weight, shift).abs())


def assert_within_slack(result: Tensor, weight: Tensor, shift: Shift) -> None:
    """Require the rounded exact sum, up to what the float32 sum may have moved.

    Rounding is monotonic, so the result lies between the roundings of both ends of the slack.
    """
    exact, slack = exact_sum(weight, shift), slack_of(weight, shift)
    low, high = (exact - slack).to(weight.dtype), (exact + slack).to(weight.dtype)
    assert bool(((low <= result) & (result <= high)).all())


def assert_nearest(result: Tensor, weight: Tensor, shift: Shift) -> None:
    """Require that, and that few sums lie within the slack of the middle between two numbers."""
    assert_within_slack(result, weight, shift)
    if weight.element_size() == 2:
        differ = int((result != exact_sum(weight, shift).to(weight.dtype)).sum())
        assert differ <= 1 + 1e-3 * result.numel()


STEP = 2.0**-26


def exact_case(
    *sizes: int, dtype: torch.dtype, right: torch.dtype, device: torch.device
) -> tuple[Tensor, Shift]:
    """Return a weight and a shift whose sums are exact in float32: whole numbers times ``STEP``.

    The sums are of all signs and magnitudes, and in float16 many are below the smallest normal
    number.
    """
    *lead, rank, d_out, d_in = sizes
    generator = torch.Generator().manual_seed(5)
    left = torch.randint(-300, 301, (*lead, rank, d_out), generator=generator) * STEP
    keys = torch.randint(-30, 31, (*lead, rank, d_in), generator=generator)
    weight = random_rows(*lead, d_out, d_in, scale=0.02) * torch.logspace(-5, 0, d_in)
    weight = ((weight.to(dtype).double() / STEP).round() * STEP).to(device, dtype)
    shift = Shift("dual", rank, left=left.float().to(device), right=keys.to(device, right))
    exact = exact_sum(weight, shift)
    assert torch.equal(exact, exact.float().double())
    return weight, shift


def by_reference(
    weight: Tensor, shift: Shift, rounding: str, seed: int | None = None, remainder=None
) -> tuple[Tensor, Tensor | None]:
    """Return what weight and remainder become by the equations in float64."""
    weight = weight.cpu().clone()
    remainder = None if remainder is None else remainder.cpu().clone()
    factors = {"left": shift.left.cpu().double(), "right": shift.right.cpu().double()}
    exact = Shift("dual", shift.rank, **factors)
    reference.apply_shift_(weight, exact, rounding, seed, remainder=remainder)
    return weight, remainder


# Nearest.


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
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_takes_the_neighbour_that_the_reference_takes(device, dtype, seed, right):
    # Sums are exact in float32, so not one decision may differ.
    weight, shift = exact_case(2, 3, 61, 127, dtype=dtype, right=right, device=device)
    nearest = exact_sum(weight, shift).to(dtype)
    expected, _ = by_reference(weight, shift, "stochastic", seed)
    apply_shift_(weight, shift, "stochastic", seed)
    assert torch.equal(weight.cpu(), expected)
    assert (weight != nearest).double().mean().item() > 0.1


@pytest.mark.parametrize("index", [0, 2**31 - 40, 2**32 - 40, 2**33 + 7, 2**62])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_random_numbers_of_far_elements(device, config, index):
    dtype = torch.bfloat16
    weight, shift = exact_case(2, 1, 5, 13, dtype=dtype, right=torch.float32, device=device)
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


# Views, and the bytes around them.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "rounding"), CASES, ids=str)
def test_strided_weight_and_the_bytes_around_it(device, dtype, rounding, layout):
    sizes = (3, 4, 13, 17)
    plain, shift = weight_of(sizes, dtype, device), make_shift(*sizes, device=device)
    seed = 5 if rounding == "stochastic" else None
    plain_remainder = None
    if rounding == "compensated":
        plain_remainder = random_rows(3, 13, 17, scale=1e-5, seed=9).to(device, dtype)
    storages, views = [], []
    for tensor in (plain, plain_remainder):
        if tensor is not None:
            storages.append(empty_storage(tensor.shape, dtype, layout).to(device))
            views.append(view_of(storages[-1], layout))
            views[-1].copy_(tensor)
    weight, remainder = views[0], views[1] if len(views) > 1 else None
    before = [storage.clone() for storage in storages]

    apply_shift_(weight, shift, rounding, seed, remainder=remainder)
    apply_shift_(plain, shift, rounding, seed, remainder=plain_remainder)

    assert same_bits(weight, plain)
    if remainder is not None:
        assert same_bits(remainder, plain_remainder)
    for storage, old in zip(storages, before, strict=True):
        for memory in (storage, old):
            view_of(memory, layout).zero_()
        assert torch.equal(bits(storage), bits(old))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("right", FACTORS, ids=str)
def test_strided_factors_are_read_and_not_written(device, layout, right):
    sizes = (3, 19, 13, 17)
    shift = make_shift(*sizes, device=device, right=right)
    views, storages = [], []
    for factor in (shift.left, shift.right):
        storages.append(empty_storage(factor.shape, factor.dtype, layout).to(device))
        views.append(view_of(storages[-1], layout))
        views[-1].copy_(factor)
    before = [storage.clone() for storage in storages]
    weight, plain = (weight_of(sizes, torch.bfloat16, device) for _ in range(2))
    apply_shift_(weight, Shift("dual", 19, left=views[0], right=views[1]))
    assert same_bits(weight, apply_shift_(plain, shift))
    assert all(same_bits(*pair) for pair in zip(storages, before, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_leading_dimensions_that_cannot_be_joined(device, rounding):
    sizes = (3, 2, 4, 13, 17)
    shift = make_shift(*sizes, device=device)
    plain = weight_of(sizes, torch.bfloat16, device)
    weight = plain.transpose(0, 1).contiguous().transpose(0, 1)
    seed = 5 if rounding == "stochastic" else None
    apply_shift_(weight, shift, rounding, seed)
    assert same_bits(weight, apply_shift_(plain, shift, rounding, seed))


@pytest.mark.parametrize(("dtype", "rounding"), CASES, ids=str)
def test_conv1d_weight_is_passed_as_its_transpose(device, dtype, rounding):
    # GPT-2's Conv1D keeps [d_in, d_out].
    shift = make_shift(9, 64, 80, device=device)
    linear = weight_of((9, 64, 80), dtype, device)
    conv = linear.mT.contiguous()
    seed = 5 if rounding == "stochastic" else None
    remainders = [None, None]
    if rounding == "compensated":
        remainders = [torch.zeros_like(linear), torch.zeros_like(conv).mT]
    apply_shift_(linear, shift, rounding, seed, remainder=remainders[0])
    apply_shift_(conv.mT, shift, rounding, seed, remainder=remainders[1])
    assert same_bits(conv.mT, linear)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_empty_weights_and_empty_shifts(device, rank, rounding):
    for lead, d_out, d_in in (((), 0, 5), ((), 5, 0), ((0,), 3, 4), ((2, 0), 3, 4), ((), 3, 4)):
        weight = random_rows(*lead, d_out, d_in).to(device, torch.bfloat16)
        before = weight.clone()
        left = torch.zeros(*lead, rank, d_out, device=device)
        right = torch.ones(*lead, rank, d_in, device=device)
        seed = 1 if rounding == "stochastic" else None
        remainder = torch.zeros_like(weight) if rounding == "compensated" else None
        shift = Shift("dual", rank, left=left, right=right)
        apply_shift_(weight, shift, rounding, seed, remainder=remainder)
        assert torch.equal(weight, before)


def test_addresses_beyond_32_bits(monkeypatch):
    if not interprets():
        pytest.skip("a GPU has no memory without memory")
    seen = Addresses(monkeypatch)
    # Strides that fit in 32 bits, times indices that then do not.
    weight = FarTensor(1 << 60, (3, 65, 33), torch.bfloat16, (1 << 46, 1 << 30, 1 << 20))
    remainder = FarTensor(1 << 61, (3, 65, 33), torch.bfloat16, (1 << 46, 1 << 20, 1 << 30))
    left = FarTensor(1 << 59, (3, 34, 65), torch.float32, (1 << 46, 1 << 30, 1 << 36))
    right = FarTensor(1 << 58, (3, 34, 33), torch.bfloat16, (1 << 46, 1 << 36, 1 << 30))
    kernels.apply_shift_(
        weight, left, right, "compensated", remainder=remainder, config=kernels.FINE
    )
    places = {
        tensor.address(*index)
        for tensor in (weight, remainder)
        for index in itertools.product(range(3), range(65), range(33))
    }
    factors = {
        tensor.address(*index)
        for tensor in (left, right)
        for index in itertools.product(*map(range, tensor.shape))
    }
    assert seen.stored == places
    assert seen.loaded == places | factors


# What surrounds the kernel.


class LargestNewTensor(TorchDispatchMode):
    """Notes the bytes of the largest memory that any operation returns, ``known`` left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_no_temporary_of_the_size_of_the_weight(device, rounding):
    weight = weight_of((2, 300, 100), torch.bfloat16, device)
    shift = make_shift(2, 300, 100, device=device)
    remainder = torch.zeros_like(weight) if rounding == "compensated" else None
    known = [weight] if remainder is None else [weight, remainder]
    seed = 1 if rounding == "stochastic" else None
    with LargestNewTensor(*known, shift.left, shift.right) as seen:
        apply_shift_(weight, shift, rounding, seed, remainder=remainder)
    # The factors in float64, for the bound of the shift.
    assert seen.nbytes <= 2 * 300 * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameter_that_requires_grad_is_changed_in_place(device, dtype):
    weight = torch.nn.Parameter(torch.ones(3, 4, dtype=dtype, device=device))
    left, right = torch.ones(1, 3, device=device), torch.ones(1, 4, device=device)
    assert apply_shift_(weight, Shift("dual", 1, left=left, right=right)) is weight
    assert torch.equal(weight.detach(), torch.full((3, 4), 2.0, dtype=dtype, device=device))
    assert weight.requires_grad and weight.is_leaf and weight.grad is None


def test_a_backward_pass_notices_the_change(device):
    weight = torch.nn.Parameter(torch.ones(3, 4, device=device))
    x = torch.ones(2, 4, device=device, requires_grad=True)
    loss = (x @ weight.mT).sum()
    left, right = torch.ones(1, 3, device=device), torch.ones(1, 4, device=device)
    apply_shift_(weight, Shift("dual", 1, left=left, right=right))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
