"""Activation gap of a query: how far a side memory's output lies from the main memory's.

``a_t = ‖ act(W' x_t + b) − act(W x_t + b) ‖₂`` for every token; of a query the mean over its
tokens or their maximum. Source: WISE (arXiv 2405.14768), section 2.3.1, in the published code's
form, which applies the model's hidden activation and takes the maximum beyond 100 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}

REDUCTIONS = ("mean", "max", "auto")

MEAN_UP_TO = 100
"""With ``reduction="auto"`` a query of more counted tokens has the maximum for its gap."""


def token_gaps(main_output: Tensor, side_output: Tensor, activation: str | None) -> Tensor:
    """Return ``‖ act(side) − act(main) ‖₂``, ``[..., tokens]``, for outputs
    ``[..., tokens, d_out]``.
    """
    act = ACTIVATIONS[activation]
    return (act(side_output) - act(main_output)).norm(dim=-1)


def query_gap(gaps: Tensor, reduction: str, mask: Tensor | None = None) -> Tensor:
    """Return the gaps of queries, ``[...]``, for those of their tokens ``[..., tokens]``.

    Tokens where ``mask`` is False do not count; a query without any has gap 0.
    """
    if mask is None:
        mask = torch.ones_like(gaps, dtype=torch.bool)
    count = mask.sum(-1)
    kept = gaps.masked_fill(~mask, 0.0)
    mean = kept.sum(-1) / count.clamp(min=1)
    if reduction == "mean" or gaps.shape[-1] == 0:
        return mean
    largest = kept.amax(-1)
    return largest if reduction == "max" else torch.where(count > MEAN_UP_TO, largest, mean)


def activation_gap(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    reduction: str = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """Return the gaps of all queries for all side memories, ``[batch, memories]``.

    ``x`` ``[batch, tokens, d_in]``, ``main`` and each of ``sides`` ``[d_out, d_in]``.
    """
    main_output = functional.linear(x, main, bias)
    gaps = [
        query_gap(
            token_gaps(main_output, functional.linear(x, side, bias), activation), reduction, mask
        )
        for side in sides
    ]
    return torch.stack(gaps, -1) if gaps else x.new_zeros(x.shape[0], 0)
