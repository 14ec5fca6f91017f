"""What ``activation_gap`` and ``routed_linear`` share: queries that belong to one memory each.

Side memory ``m`` differs from the main memory in one part of the input features alone, and query
``b`` is strong in one part alone; a last kind of query is strong nowhere and belongs to the main
memory. So every right decision is right by a wide margin, whatever rounding does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.gpu.case import DTYPES, Inputs, Outputs, normal

SPREAD = 0.02
"""Standard deviation of the weights."""

EDITED = 0.02
"""Standard deviation of what an edited part of the weights has changed by."""

WEAK = 0.05
"""Scale of the features of a query that belong to another memory."""


def make(
    shape: tuple[int, int, int, int],
    memories: int,
    dtype: str,
    device: torch.device,
    generator: torch.Generator,
    *,
    masked: bool = False,
    bias: bool = False,
) -> Inputs:
    """Return x ``[batch, tokens, d_in]``, main and sides, thresholds, the owner of each query."""
    batch, tokens, d_in, d_out = shape
    kind = DTYPES[dtype]
    part = max(1, d_in // max(1, memories))
    owner = torch.arange(batch, device=device) % (memories + 1)
    features = torch.arange(d_in, device=device) // part
    strong = features[None, :] == owner[:, None]
    x = normal((batch, tokens, d_in), torch.float32, device, generator)
    x = (x * torch.where(strong, 1.0, WEAK)[:, None, :]).to(kind)
    main = normal((d_out, d_in), kind, device, generator, SPREAD)
    sides = []
    for number in range(memories):
        side = main.clone()
        columns = slice(number * part, (number + 1) * part)
        side[:, columns] += normal((d_out, part), kind, device, generator, EDITED)
        sides.append(side)
    # A quarter of the gap of a strong query without an activation, five times that of a weak one.
    threshold = 0.25 * EDITED * math.sqrt(part * d_out)
    inputs: Inputs = {
        "x": x,
        "main": main,
        "sides": sides,
        "thresholds": torch.full((memories,), threshold, device=device),
        "owner": torch.where(owner == memories, -1, owner),
        "mask": None,
        "bias": normal((d_out,), kind, device, generator, 0.1) if bias else None,
    }
    if masked:
        lengths = torch.arange(batch, device=device) % tokens + 1
        inputs["mask"] = torch.arange(tokens, device=device)[None, :] < lengths[:, None]
        inputs["x"] = x.masked_fill(~inputs["mask"][..., None], math.nan)
    return inputs


def plain_gaps(outputs: list[Tensor], activation: str | None, mask: Tensor | None) -> Tensor:
    """Return the gaps of outputs of the main and the side memories, from their own dtype."""
    from pyeditfast.reference.activation_gap import query_gap, token_gaps

    centre = outputs[0].float()
    found = [
        query_gap(token_gaps(centre, output.float(), activation), "auto", mask)
        for output in outputs[1:]
    ]
    return torch.stack(found, -1)


def plain_outputs(inputs: Inputs, x: Tensor) -> list[Tensor]:
    """Return the outputs of all memories by torch."""
    return [linear(x, memory, inputs["bias"]) for memory in (inputs["main"], *inputs["sides"])]


def products(inputs: Inputs) -> Outputs:
    """Return the products of x with every memory, alone."""
    return {str(place): found for place, found in enumerate(plain_outputs(inputs, inputs["x"]))}


def widened(inputs: Inputs) -> Inputs:
    """Return the memories and the bias in float64."""
    bias = inputs["bias"]
    return {
        "main": inputs["main"].double(),
        "sides": [side.double() for side in inputs["sides"]],
        "bias": None if bias is None else bias.double(),
    }
