"""The activations of the kernels, each number by itself, against torch's in float64."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from activation_error import activation_error
from decode_inputs import ACTIVATIONS

from pyeditfast.reference.activation_gap import ACTIVATIONS as FORMULAS
from pyeditfast_kernels.activations import activate, activation_name

NUMBERS = 1 << 16


@triton.jit
def activate_kernel(x, y, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(y + lanes, activate(tl.load(x + lanes), ACTIVATION))


def launch(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    y = torch.full_like(x, math.nan)
    activate_kernel[(1,)](x, y, activation_name(activation), NUMBERS)
    return y.cpu()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("exponent", [-30, -3, 0, 1, 2, 3, 4, 5, 7, 30, 50])
def test_every_digit(device, activation, exponent):
    """Numbers of both signs up to 2 to the ``exponent``."""
    x = torch.linspace(-1.0, 1.0, NUMBERS, dtype=torch.float64).mul(2.0**exponent).float()
    exact = FORMULAS[activation](x.double())
    error = (launch(x.to(device), activation).double() - exact).abs()
    assert bool((error <= activation_error(x.double(), activation)).all())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_no_finite_number_overflows_on_the_way(device, activation):
    largest = torch.finfo(torch.float32).max
    x = torch.zeros(NUMBERS)
    x[:3] = torch.tensor([largest, -largest, math.nan])
    y = launch(x.to(device), activation)
    assert y[0] == largest and y[1] == (-largest if activation is None else 0.0) and y[2].isnan()
    assert bool((y[3:] == 0.0).all())
