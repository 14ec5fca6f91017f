"""Calls of the CUDA kernels for decoding, and what they have to give."""

from __future__ import annotations

from typing import Any

import torch
from decode_inputs import tokens, weights_of
from error_bounds import assert_within, gap_bound, output_bound
from gated_inputs import without_gate, without_ties
from ops.layouts import random_rows
from ops.tolerances import assert_as_accurate
from query_inputs import Queries
from torch import Tensor

from pyeditfast import reference
from pyeditfast.ops import decode_on_cuda
from pyeditfast.reference.routed_linear import Routed

CPU = torch.device("cpu")

# Roundings beside those of the sum: of a gated input and of the result.
STEPS = 10


def decode_inputs(
    batch: int,
    sides: int,
    d_out: int,
    d_in: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    gated: bool = False,
    scale: float = 1.0,
    weight_scale: float = 1.0,
) -> Queries:
    """Return random single tokens and their memories."""
    main, others = weights_of(sides, d_out, d_in, dtype, CPU, weight_scale)
    return Queries(
        tokens(batch, d_in, dtype, CPU, scale=scale),
        main,
        others,
        random_rows(d_out, seed=3, dtype=dtype) if bias else None,
        gate=tokens(batch, d_in, dtype, CPU, seed=8) if gated else None,
    )


def decide(
    inputs: Queries,
    thresholds: Tensor,
    activation: str | None = None,
    gate_activation: str | None = None,
    splits: int = 0,
) -> Routed:
    """Return outputs, routes and gaps."""
    return decode_on_cuda.routed_decode(
        inputs.x,
        inputs.main,
        inputs.sides,
        thresholds,
        inputs.bias,
        activation,
        inputs.mask,
        None,
        inputs.gate,
        gate_activation,
        splits,
    )


def follow(
    inputs: Queries, route: Tensor, gate_activation: str | None = None, splits: int = 0
) -> Tensor:
    """Return the outputs with a given route."""
    return decode_on_cuda.routed_decode(
        inputs.x,
        inputs.main,
        inputs.sides,
        torch.zeros(len(inputs.sides)),
        inputs.bias,
        None,
        None,
        route,
        inputs.gate,
        gate_activation,
        splits,
    ).output


def gaps_of(inputs: Queries, activation: str | None = None, splits: int = 0) -> Tensor:
    """Return the gaps alone."""
    return decode_on_cuda.decode_gap(
        inputs.x, inputs.main, inputs.sides, inputs.bias, activation, inputs.mask, splits
    )


def part(inputs: Queries, rows: Any) -> Queries:
    """Return some rows of the inputs."""
    gate = None if inputs.gate is None else inputs.gate[rows]
    mask = None if inputs.mask is None else inputs.mask[rows]
    return inputs.but(x=inputs.x[rows], gate=gate, mask=mask)


def outputs_of(inputs: Queries, route: Tensor, gate_activation: str | None) -> Tensor:
    return reference.routed_linear(
        inputs.x,
        inputs.main,
        inputs.sides,
        torch.zeros(len(inputs.sides)),
        bias=inputs.bias,
        route=route,
        gate=inputs.gate,
        gate_activation=gate_activation,
    ).output


def assert_follows(
    inputs: Queries, route: Tensor, gate_activation: str | None = None, splits: int = 0
) -> None:
    """Require outputs as near to float64 as their roundings allow, and as near as torch's."""
    inputs = without_ties(inputs, gate_activation)
    result = follow(inputs, route, gate_activation, splits)
    exact, _ = without_gate(inputs, gate_activation)
    expected = outputs_of(exact, route, None)
    assert_within(result, expected, output_bound(inputs, route, gate_activation))
    naive = outputs_of(inputs, route, gate_activation)
    assert_as_accurate(result, naive, expected, inputs.x.shape[-1] + STEPS)


def assert_gaps(inputs: Queries, activation: str | None = None, splits: int = 0) -> None:
    """Require gaps as near to float64 as their roundings allow."""
    result = gaps_of(inputs, activation, splits)
    assert result.dtype == torch.float32
    exact, _ = without_gate(inputs, None)
    expected = reference.activation_gap(
        exact.x,
        exact.main,
        exact.sides,
        bias=exact.bias,
        activation=activation,
        mask=exact.mask,
    )
    assert_within(result, expected, gap_bound(inputs, activation))
