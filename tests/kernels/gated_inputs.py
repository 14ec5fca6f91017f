"""Gated inputs, ``act(gate) · x``: what the kernels multiply, exactly.

They compute the product in float32 and round it once to the dtype of ``x``. In 16 bits that
rounding is many times larger than all that float32 loses later, and known: the formula is given the
rounded product, and no loss has to be granted for it. Where the exact product lies so near the
middle of two 16-bit numbers that float32's last digits decide, no one can say which is right, and
``without_ties`` makes it zero. In float32 the last digits themselves are granted.
"""

from __future__ import annotations

import torch
from activation_error import ROUNDOFF, activation_error
from query_inputs import Queries
from torch import Tensor

from pyeditfast.reference.activation_gap import ACTIVATIONS


def gated(inputs: Queries, activation: str | None) -> tuple[Tensor, Tensor]:
    """Return ``act(gate) · x`` in float64, and how far float32's may be off."""
    x, gate = inputs.x.cpu().double(), inputs.gate.cpu().double()
    product = ACTIVATIONS[activation](gate) * x
    return product, activation_error(gate, activation) * x.abs() + ROUNDOFF * product.abs()


def without_ties(inputs: Queries, activation: str | None) -> Queries:
    """Return the inputs with ``x`` zero where it is open how the gated 16-bit input is rounded."""
    if inputs.gate is None or inputs.x.dtype == torch.float32:
        return inputs
    product, error = gated(inputs, activation)
    low, high = ((product + side).to(inputs.x.dtype) for side in (-2.0 * error, 2.0 * error))
    return inputs.but(x=inputs.x.masked_fill((low != high).to(inputs.x.device), 0.0))


def without_gate(inputs: Queries, activation: str | None) -> tuple[Queries, Tensor]:
    """Return in float64 what is multiplied, as inputs without a gate, and how far it may be off."""
    exact = inputs.to(torch.device("cpu")).to(torch.float64).but(gate=None)
    if inputs.gate is None:
        return exact, torch.zeros_like(exact.x)
    product, error = gated(inputs, activation)
    if inputs.x.dtype == torch.float32:
        return exact.but(x=product), error
    return exact.but(x=product.to(inputs.x.dtype).double()), torch.zeros_like(product)
