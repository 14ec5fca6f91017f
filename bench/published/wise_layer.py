"""The module with side memories and the router of the released WISE code, on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

NO_GAP = 1e9
"""The smallest in-scope gap before there was an edit; its threshold is out of reach."""

MEAN_UP_TO = 100
"""At inference a call of more tokens has the largest token gap for its gap, not their mean."""

MAIN = -1
"""The route of a call that the main memory answers."""


class PublishedWiseLayer(nn.Module):
    """A linear module with its side memories and the published router, one decision a call.

    Inputs are ``[batch, tokens, d_in]`` or ``[tokens, d_in]``. While ``editing``, the side weight
    answers and both outputs are kept for the loss. Otherwise gaps go to the host one by one, and
    every row of the call gets the same memory, from the tokens of this call alone.
    """

    def __init__(
        self,
        layer: nn.Linear | Conv1D,
        activation: Callable[[Tensor], Tensor],
        *,
        act_ratio: float,
        retrieve: bool,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.main_weight = layer.weight
        self.original_layer = copy.deepcopy(layer).requires_grad_(False)
        self.side_weight = nn.Parameter(self.main_weight.detach().clone(), requires_grad=False)
        self.activation = activation
        self.act_ratio = act_ratio
        self.retrieve = retrieve
        self.smallest_gap = NO_GAP
        self.memories: list[Tensor] = []
        self.memory_gaps: list[float] = []
        self.editing = False
        self.original_output: Tensor | None = None
        self.side_output: Tensor | None = None
        self.route = MAIN

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return ``x Wᵀ + b`` for a weight in the layout of the module's own."""
        if not isinstance(self.layer, Conv1D):
            return nn.functional.linear(x, weight, self.layer.bias)
        flat = torch.addmm(self.layer.bias, x.reshape(-1, x.shape[-1]), weight)
        return flat.view(*x.shape[:-1], flat.shape[-1])

    def token_gaps(self, original: Tensor, side: Tensor) -> Tensor:
        """Return ``‖ act(side) − act(original) ‖₂`` for every token, ``[..., tokens]``."""
        return (self.activation(side) - self.activation(original)).norm(dim=-1)

    def call_gap(self, original: Tensor, side: Tensor) -> float:
        """Return the gap of a whole call, averaged over its rows, on the host."""
        gaps = torch.atleast_2d(self.token_gaps(original, side))
        rows = gaps.amax(-1) if gaps.shape[-1] > MEAN_UP_TO else gaps.mean(-1)
        return rows.mean().item()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the side weight while editing, of the routed memory otherwise."""
        original = self.original_layer(x)
        side = self.apply_weight(x, self.side_weight)
        if self.editing:
            self.original_output, self.side_output = original, side
            return side
        route = self._retrieved if self.retrieve else self._merged
        return route(x, original, side)

    def _retrieved(self, x: Tensor, original: Tensor, side: Tensor) -> Tensor:
        # A memory has to beat the gap of the current side weight even where that one is below its
        # own threshold: so the released code decides.
        largest = self.call_gap(original, side)
        self.route, output = MAIN, original
        if largest >= self.smallest_gap * self.act_ratio:
            self.route, output = len(self.memories), side
        for number, (memory, smallest) in enumerate(
            zip(self.memories, self.memory_gaps, strict=True)
        ):
            candidate = self.apply_weight(x, memory)
            gap = self.call_gap(original, candidate)
            if gap > largest and gap > smallest * self.act_ratio:
                self.route, output, largest = number, candidate, gap
        return output

    def _merged(self, x: Tensor, original: Tensor, side: Tensor) -> Tensor:
        merged = self.layer(x)
        side_gap = self.call_gap(original, side)
        merged_gap = self.call_gap(original, merged)
        threshold = self.smallest_gap * self.act_ratio
        if merged_gap < threshold and side_gap < threshold:
            self.route = MAIN
            return original
        self.route = 0 if merged_gap > side_gap else 1
        return merged if self.route == 0 else side
