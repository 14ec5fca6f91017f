"""Main and side memories, and the gaps and routes of queries by their formulas: float64, one row,
token and memory at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from layouts import random_rows
from tolerances import UNIT_ROUNDOFF, floor, largest_error
from torch import Tensor
from torch.nn import functional

PLAIN = {
    None: lambda x: x,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
"""The activations in plain torch."""

ACTIVATIONS = tuple(PLAIN)


def activated(name: str | None, values: np.ndarray) -> np.ndarray:
    """Return the activation of float64 numbers."""
    if name is None:
        return values
    if name == "silu":
        return values / (1.0 + np.exp(-values))
    if name == "gelu":
        return np.array([0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))) for v in values])
    if name == "gelu_tanh":
        return (
            0.5
            * values
            * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (values + 0.044715 * values**3)))
        )
    assert name == "relu"
    return np.where(values > 0, values, 0.0)


def exact_outputs(row: np.ndarray, memory: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Return the output ``[d_out]`` for one token ``[d_in]``."""
    output = (memory * row).sum(-1)
    return output if bias is None else output + bias


def gated(x: Tensor, gate: Tensor | None, name: str | None) -> Tensor:
    """Return ``act(gate) · x`` in float64."""
    if gate is None:
        return x.double()
    flat = activated(name, gate.double().flatten().numpy()) * x.double().flatten().numpy()
    return torch.from_numpy(flat).reshape(x.shape)


def exact_gaps(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    reduction: str = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """Return the gaps ``[batch, memories]`` in float64."""
    gaps = torch.zeros(x.shape[0], len(sides), dtype=torch.float64)
    centre, offset = as_float64(main), None if bias is None else as_float64(bias)
    for number, side in enumerate(sides):
        memory = as_float64(side)
        for b in range(x.shape[0]):
            each = []
            for t in range(x.shape[1]):
                if mask is not None and not mask[b, t]:
                    continue
                row = as_float64(x[b, t])
                there = activated(activation, exact_outputs(row, memory, offset))
                here = activated(activation, exact_outputs(row, centre, offset))
                each.append(math.sqrt(((there - here) ** 2).sum()))
            if each:
                largest = reduction == "max" or (reduction == "auto" and len(each) > 100)
                gaps[b, number] = max(each) if largest else sum(each) / len(each)
    return gaps


def plain_gaps(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the gaps that plain torch finds in the dtype of ``x``, with ``reduction="auto"``."""
    act = PLAIN[activation]
    gaps = x.new_zeros(x.shape[0], len(sides))
    for b, row in enumerate(x):
        tokens = row if mask is None else row[mask[b]]
        if tokens.shape[0] == 0:
            continue
        here = act(functional.linear(tokens, main, bias))
        for number, side in enumerate(sides):
            each = (act(functional.linear(tokens, side, bias)) - here).square().sum(-1).sqrt()
            gaps[b, number] = each.max() if each.shape[0] > 100 else each.mean()
    return gaps


def assert_gaps_as_accurate(
    gaps: Tensor, x: Tensor, main: Tensor, sides: Sequence[Tensor], **options: object
) -> None:
    """Require gaps, with ``reduction="auto"``, that lose at most twice what plain torch loses.

    The floor counts the one rounding of every output to 16 bits beside the sums in float32.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert gaps.dtype == wide
    exact = exact_gaps(x, main, sides, **options)
    yardstick = largest_error(plain_gaps(x, main, sides, **options), exact)
    granted = floor(wide, x.shape[-1]) + (UNIT_ROUNDOFF[x.dtype] if x.dtype != wide else 0.0)
    error = largest_error(gaps, exact)
    assert error <= 2.0 * yardstick + granted, (error, yardstick)


def exact_route(gaps: Sequence[Sequence[float]], thresholds: Sequence[float]) -> list[int]:
    """Return for each row the first of the largest gaps above their thresholds, −1 without one."""
    route = []
    for row in gaps:
        best = -1
        for number, gap in enumerate(row):
            if gap > thresholds[number] and (best < 0 or gap > row[best]):
                best = number
        route.append(best)
    return route


def random_memories(
    d_out: int, d_in: int, count: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Return a main memory and side memories, each farther from it than the one before."""
    scale = 1.0 / math.sqrt(d_in)
    main = random_rows(d_out, d_in, seed=seed, dtype=torch.float64, scale=scale)
    sides = [
        main
        + 0.5
        * 1.6**number
        * random_rows(d_out, d_in, seed=seed + number + 1, dtype=torch.float64, scale=scale)
        for number in range(count)
    ]
    return main.to(dtype), [side.to(dtype) for side in sides]


def random_mask(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Return a mask that counts two tokens in three, and in every row one at least."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, tokens, generator=generator) < 2 / 3
    mask[:, tokens // 2] = True
    return mask


def as_float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def growing_queries(
    batch: int, tokens: int, d_in: int, dtype: torch.dtype = torch.float32, seed: int = 9
) -> Tensor:
    """Return queries of growing size, so that their gaps are far apart."""
    size = 1.5 ** torch.arange(batch, dtype=torch.float64)[:, None, None]
    return (random_rows(batch, tokens, d_in, dtype=torch.float64, seed=seed) * size).to(dtype)


def far_thresholds(gaps: Tensor) -> Tensor:
    """Return thresholds that leave some query to every memory and to the main one, chosen so that
    no rounding to 16 bits sends a query elsewhere.
    """
    columns = [sorted(column) for column in gaps.T.tolist()]
    between = [[math.sqrt(a * b) for a, b in itertools.pairwise(column)] for column in columns]
    rows, everyone = gaps.tolist(), set(range(-1, gaps.shape[1]))
    fit = [
        (margin_of_route(rows, thresholds), thresholds)
        for thresholds in itertools.product(*between)
        if set(exact_route(rows, thresholds)) == everyone
    ]
    margin, thresholds = max(fit)
    assert margin > 0.02, margin
    return torch.tensor(thresholds)


def margin_of_route(rows: Sequence[Sequence[float]], thresholds: Sequence[float]) -> float:
    """Return by what part a gap may change before a query goes elsewhere."""
    margins = []
    for row in rows:
        pairs = list(zip(row, thresholds, strict=True))
        margins += [abs(math.log(gap / threshold)) for gap, threshold in pairs]
        above = sorted(gap for gap, threshold in pairs if gap > threshold)
        margins += [math.log(above[-1] / above[-2])] if len(above) > 1 else []
    return min(margins)


def exact_output(
    inputs: Tensor, main: Tensor, sides: list[Tensor], route: list[int], bias: Tensor | None
) -> Tensor:
    """Return the output in float64, for inputs in float64 that went through their gate."""
    offset = None if bias is None else as_float64(bias)
    output = torch.empty(*inputs.shape[:2], main.shape[0], dtype=torch.float64)
    for b, number in enumerate(route):
        memory = as_float64(main if number < 0 else sides[number])
        for t, row in enumerate(as_float64(inputs[b])):
            output[b, t] = torch.from_numpy(exact_outputs(row, memory, offset))
    return output


def plain_output(
    x: Tensor, main: Tensor, sides: list[Tensor], route: list[int], bias: Tensor | None
) -> Tensor:
    """Return what plain torch makes of each query in the dtype of ``x``."""
    memories = [main if number < 0 else sides[number] for number in route]
    rows = [functional.linear(row, memory, bias) for row, memory in zip(x, memories, strict=True)]
    return torch.stack(rows)


def routing_case(batch, tokens, d_in, d_out, memories, dtype):
    """Return ``x``, main, sides and a bias."""
    main, sides = random_memories(d_out, d_in, memories, dtype)
    bias = random_rows(1, d_out, dtype=dtype, seed=5, scale=0.5)[0]
    return growing_queries(batch, tokens, d_in, dtype), main, sides, bias
