"""A linear module with side memories: every query is answered by the memory that its gap chooses
(WISE, arXiv 2405.14768, section 2.3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pyeditfast.reference.activation_gap import ACTIVATIONS, activation_gap
from pyeditfast.reference.choose_route import choose_route


class Routed(NamedTuple):
    """``output`` ``[batch, tokens, d_out]``; ``route`` ``[batch]`` int64, −1 for the main memory;
    ``gaps`` ``[batch, memories]``, None where the route was given.
    """

    output: Tensor
    route: Tensor
    gaps: Tensor | None


def routed_linear(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    thresholds: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    reduction: str = "auto",
    mask: Tensor | None = None,
    route: Tensor | None = None,
    gate: Tensor | None = None,
    gate_activation: str | None = "silu",
) -> Routed:
    """Return ``x W_rᵀ + b`` with ``r`` chosen by ``choose_route`` for each query, or ``route``.

    With ``gate`` the input is ``act(gate) · x``, as in a gated feed-forward block, whose up
    projection is then ``x``.
    """
    if gate is not None:
        x = ACTIVATIONS[gate_activation](gate) * x
    gaps = None
    if route is None:
        gaps = activation_gap(
            x, main, sides, bias=bias, activation=activation, reduction=reduction, mask=mask
        )
        route = choose_route(gaps, thresholds)
    output = functional.linear(x, main, bias)
    for number, side in enumerate(sides):
        chosen = (route == number)[:, None, None]
        output = torch.where(chosen, functional.linear(x, side, bias), output)
    return Routed(output, route, gaps)
