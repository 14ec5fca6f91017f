"""What the kernels' activations lose in float32.

Each is ``x · s`` with a factor ``s`` between 0 and 1 that holds one exponential ``exp(−z)``. The
argument of that has been rounded a few times, which costs the result some ``z`` roundoffs below
zero, where ``z`` grows, and next to nothing above, where the exponential is small beside 1. The
rest is a constant number of roundoffs: of a GPU's exponential (up to two units in the last place)
and its division (two), of the sum and the products; for ``gelu`` of a polynomial whose terms are
larger than itself, and whose fit is off by one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyeditfast.reference.activation_gap import ACTIVATIONS

ROUNDOFF = 2.0**-24
"""The largest relative error of one rounding to float32."""

SMALLEST_NORMAL = 2.0**-126
"""Below it float32 has fewer digits, and a GPU's exponential has zero."""


@dataclass(frozen=True)
class Loss:
    """``constant + growing · z`` roundoffs with ``z`` the ``exponent`` of an argument below zero;
    ``slope`` is the activation's largest.
    """

    slope: float
    constant: float
    growing: float
    exponent: Callable[[Tensor], Tensor]


def _tanh_exponent(y: Tensor) -> Tensor:
    return (2.0 * math.sqrt(2.0 / math.pi) * (y + 0.044715 * y**3)).abs()


LOSSES = {
    "silu": Loss(1.1, 9.0, 1.5, torch.abs),
    "gelu": Loss(1.13, 12.0, 3.0, lambda y: 0.5 * y * y),
    "gelu_tanh": Loss(1.13, 9.0, 5.0, _tanh_exponent),
}
"""Of the activations that are more than a choice."""


def largest_slope(activation: str | None) -> float:
    """Return by how much an activation enlarges an error of its argument at most."""
    return LOSSES[activation].slope if activation in LOSSES else 1.0


def activation_error(y: Tensor, activation: str | None) -> Tensor:
    """Return how far float32's activation of ``y``, given exactly in float64, may be off."""
    if activation not in LOSSES:
        return torch.zeros_like(y)
    loss = LOSSES[activation]
    roundoffs = loss.constant + loss.growing * loss.exponent(y.clamp(max=0.0))
    lost = ROUNDOFF * roundoffs * ACTIVATIONS[activation](y).abs()
    # What the float64 formula itself loses: 1 + erf cancels far below zero.
    return lost + SMALLEST_NORMAL + 2.0**-51 * y.abs()
