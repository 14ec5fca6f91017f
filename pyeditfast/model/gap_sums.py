"""Activation gaps of prompts that come in pieces: what has been seen so far is enough to go on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyeditfast.reference.activation_gap import MEAN_UP_TO


@dataclass(frozen=True)
class GapSums:
    """What the gaps of prompts need of the tokens seen so far.

    ``total`` and ``largest`` ``[queries, memories]``: the sum and the maximum of the token gaps;
    ``count`` ``[queries]`` int64: the tokens counted. ``total`` is not kept up where ``count``
    exceeds ``MEAN_UP_TO`` and the reduction is ``"auto"``: the mean is never asked for again.
    """

    total: Tensor
    largest: Tensor
    count: Tensor

    @classmethod
    def of_piece(cls, mean: Tensor, largest: Tensor, count: Tensor) -> GapSums:
        """Return the sums of one piece with gaps ``mean`` and ``largest`` over ``count`` tokens."""
        return cls(mean * count[:, None], largest, count)

    def __add__(self, later: GapSums) -> GapSums:
        return GapSums(
            self.total + later.total,
            torch.maximum(self.largest, later.largest),
            self.count + later.count,
        )

    def repeated(self, times: int) -> GapSums:
        """Return the sums with every query ``times`` times, next to itself."""
        if times == 1:
            return self
        tensors = (self.total, self.largest, self.count)
        return GapSums(*(tensor.repeat_interleave(times, 0) for tensor in tensors))

    def gaps(self, reduction: str) -> Tensor:
        """Return the gaps ``[queries, memories]``, as if the tokens had come in one piece."""
        mean = self.total / self.count.clamp(min=1)[:, None]
        if reduction == "mean":
            return mean
        if reduction == "max":
            return self.largest
        return torch.where(self.count[:, None] > MEAN_UP_TO, self.largest, mean)
