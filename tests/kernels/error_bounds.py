"""How far a gap or an output may be from the float64 formula, computed from the inputs themselves.

What plain torch loses on the same inputs is no yardstick for a few numbers: it is one draw, and by
luck next to nothing. Here every rounding is followed to the result instead.

*Outputs.* ``y = Σ_k W_k x_k + b`` is a float32 sum of ``n`` terms in an order of the kernel's own.
An addition loses at most ``u = 2⁻²⁴`` of a partial sum. In a random order a partial sum of the
products is about a share of the whole, give or take half their norm ``‖W ∘ x‖``, and it is never
above ``|W| |x|``: so it counts as ``s = min(|W x| + ‖W ∘ x‖, |W| |x|)``. Roundings are as often up
as down, and of n of them √n remain (Higham and Mary, "A new approach to probabilistic rounding
error analysis", 2019):

    |ŷ − y| ≤ e = u (1 + √n) (s + |b|) + ‖W ∘ δ‖,

with ``δ`` what the input lost before. Products of 16 bits are exact: ``n = d_in``, and one for the
bias. A float32 product is six 16-bit ones and leaves out up to three roundoffs: seven more. For a
few terms this is all roundings at their worst, for many some five standard deviations.

*Gaps.* ``d = act(y') − act(y)`` is off by what its four parts are: ``L e'``, ``L e``, ``a'`` and
``a`` with ``L`` the activation's largest slope and ``a`` its own error; at most by their sum ``r``,
by the root ``q`` of their squares' sum if they are independent. With ``g = ‖d‖`` an error ε of d is

    ⟨d, ε⟩ / g ≤ ‖d + ε‖ − g ≤ min(⟨d, ε⟩ / g + ‖ε‖² / 2g, ‖ε‖).

Errors of different outputs come from different roundings, so ``⟨d, ε⟩ / g`` stays below ``‖d ∘ q‖ /
g``; difference, squares, their sum and its root add ``u (3 + √d_out / 2) g`` at random. A mean over
T tokens leaves the root of T of what is random, and adds ``u (1 + √T)`` of itself.

*Tensor cores* cut off what does not fit instead of rounding it: up to ``2u``, always towards zero.
What 16-bit sums lose that way does not average out, and a gap may be off by ``‖r‖``. Float32's are
moved by rounded additions while they are short (see ``kernels/tile_product.py``).
"""

from __future__ import annotations

import math

import torch
from activation_error import ROUNDOFF, activation_error, largest_slope
from gated_inputs import without_gate
from ops.tolerances import UNIT_ROUNDOFF
from query_inputs import Queries
from torch import Tensor
from torch.nn import functional

from pyeditfast.reference.activation_gap import ACTIVATIONS, MEAN_UP_TO, query_gap
from pyeditfast_kernels.launch import interprets


def output_error(
    x: Tensor, lost: Tensor, memory: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``e`` of a memory's outputs, ``[batch, tokens, d_out]``; ``lost`` is δ."""
    products = functional.linear(x, memory).abs() + functional.linear(x**2, memory**2).sqrt()
    sums = torch.minimum(products, functional.linear(x.abs(), memory.abs()))
    if bias is not None:
        sums = sums + bias.abs()
    terms = x.shape[-1] + (8 if dtype == torch.float32 else 1)
    unit = ROUNDOFF if interprets() else 2.0 * ROUNDOFF
    before = functional.linear(lost**2, memory**2).sqrt()
    return unit * (1.0 + math.sqrt(terms)) * sums + before


def output_bound(inputs: Queries, route: Tensor, gate_activation: str | None) -> Tensor:
    """Return how far outputs may be off, ``[batch, tokens, d_out]``, rounded to their dtype."""
    exact, lost = without_gate(inputs, gate_activation)
    dtype = inputs.x.dtype
    bound = torch.empty(*exact.x.shape[:2], len(exact.main), dtype=torch.float64)
    numbers = torch.where((route >= 0) & (route < len(inputs.sides)), route, -1).cpu()
    for number, memory in enumerate((exact.main, *exact.sides), start=-1):
        mine = numbers == number
        x = exact.x[mine]
        error = output_error(x, lost[mine], memory, exact.bias, dtype)
        size = functional.linear(x, memory, exact.bias).abs() + error
        # The spacing of numbers does not become smaller below the normal ones.
        size = size.clamp(min=torch.finfo(dtype).smallest_normal)
        bound[mine] = error + UNIT_ROUNDOFF[dtype] * size
    return bound


def gap_bound(
    inputs: Queries,
    activation: str | None,
    reduction: str = "auto",
    gate_activation: str | None = None,
) -> Tensor:
    """Return how far gaps may be off, ``[batch, sides]``."""
    exact, lost = without_gate(inputs, gate_activation)
    dtype, act = inputs.x.dtype, ACTIVATIONS[activation]
    averages = interprets() or dtype == torch.float32
    values, parts = [], []
    for memory in (exact.main, *exact.sides):
        output = functional.linear(exact.x, memory, exact.bias)
        error = output_error(exact.x, lost, memory, exact.bias, dtype)
        values.append(act(output))
        parts.append((largest_slope(activation) * error, activation_error(output, activation)))
    bounds = [
        _query_bound(value - values[0], (*parts[0], *part), reduction, exact.mask, averages)
        for value, part in zip(values[1:], parts[1:], strict=True)
    ]
    return torch.stack(bounds, -1)


def _query_bound(
    difference: Tensor,
    parts: tuple[Tensor, ...],
    reduction: str,
    mask: Tensor | None,
    averages: bool,
) -> Tensor:
    """Return the bound of queries from all their differences, and the parts these are off by."""
    tokens, d_out = difference.shape[-2:]
    gap = difference.norm(dim=-1)
    worst = sum(parts).norm(dim=-1)
    random, always = torch.zeros_like(gap), worst
    if averages:
        independent = sum(part**2 for part in parts).sqrt()
        along = (difference * independent).norm(dim=-1) / gap
        beside = worst**2 / (2.0 * gap)
        # Not so where a gap is zero.
        is_less = along + beside < worst
        random, always = torch.where(is_less, along, random), torch.where(is_less, beside, worst)
    random = torch.hypot(random, ROUNDOFF * (3.0 + 0.5 * math.sqrt(d_out)) * gap)
    if mask is None:
        mask = torch.ones_like(gap, dtype=torch.bool)
    count = mask.sum(-1)
    of_mean = (query_gap(random**2, "mean", mask) / count.clamp(min=1)).sqrt()
    of_mean += query_gap(always, "mean", mask)
    of_mean += ROUNDOFF * (1.0 + math.sqrt(tokens)) * query_gap(gap, "mean", mask)
    of_largest = query_gap(random + always, "max", mask)
    takes_largest = count > {"mean": tokens, "max": -1, "auto": MEAN_UP_TO}[reduction]
    return torch.where(takes_largest, of_largest, of_mean)


def assert_within(result: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Require every number of ``result`` to be as near to ``exact`` as its ``bound`` says."""
    assert result.shape == exact.shape == bound.shape, (result.shape, exact.shape, bound.shape)
    assert exact.dtype == bound.dtype == torch.float64, (exact.dtype, bound.dtype)
    error = (result.double() - exact).abs()
    beyond = ~(error <= bound)
    assert not beyond.any(), (error[beyond], bound[beyond])
