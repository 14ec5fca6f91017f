"""Weights and shifts for the tests of apply_shift, and what the kernel must make of them."""

from __future__ import annotations

import torch
from ops.layouts import random_rows
from ops.tolerances import UNIT_ROUNDOFF
from torch import Tensor

from pyeditfast import reference
from pyeditfast.ops import Shift
from pyeditfast_kernels import apply_shift as kernels
from pyeditfast_kernels.launch import Config

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALVES = DTYPES[:2]
FACTORS = (torch.bfloat16, torch.float32)

CASES = [(dtype, rounding) for dtype in DTYPES for rounding in ("nearest", "compensated")]
CASES += [(dtype, "stochastic") for dtype in HALVES]

CONFIGS = (kernels.SQUARE, kernels.NARROW, kernels.FINE)


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
