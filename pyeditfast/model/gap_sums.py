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
    ``largest`` is None where it would take all products again and only a longer prompt asks for it.
    """

    total: Tensor
    largest: Tensor | None
    count: Tensor

    @classmethod
    def of_piece(cls, mean: Tensor, largest: Tensor | None, count: Tensor) -> GapSums:
        """Return the sums of one piece with gaps ``mean`` and ``largest`` over ``count`` tokens."""
        return cls(mean * count[:, None], largest, count)

    def __add__(self, later: GapSums) -> GapSums:
        assert self.largest is not None and later.largest is not None
        return GapSums(
            self.total + later.total,
            torch.maximum(self.largest, later.largest),
            self.count + later.count,
        )

    def repeated(self, times: int) -> GapSums:
        """Return the sums with every query ``times`` times, next to itself."""
        if times == 1:
            return self
        assert self.largest is not None
        tensors = (self.total, self.largest, self.count)
        return GapSums(*(tensor.repeat_interleave(times, 0) for tensor in tensors))

    def copied(self) -> GapSums:
        """Return the sums in memory of their own."""
        largest = None if self.largest is None else self.largest.clone()
        return GapSums(self.total.clone(), largest, self.count.clone())

    def gaps(self, reduction: str) -> Tensor:
        """Return the gaps ``[queries, memories]``, as if the tokens had come in one piece."""
        mean = self.total / self.count.clamp(min=1)[:, None]
        if reduction == "mean":
            return mean
        assert self.largest is not None
        if reduction == "max":
            return self.largest
        return torch.where(self.count[:, None] > MEAN_UP_TO, self.largest, mean)


def counted_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return how many tokens of ``x`` ``[queries, columns, d_in]`` the ``mask`` counts, int64."""
    if mask is None:
        return torch.full(x.shape[:1], x.shape[1], dtype=torch.int64, device=x.device)
    return mask.sum(-1)


def all_are_long(x: Tensor, mask: Tensor | None, count: Tensor) -> bool:
    """Say whether the gaps of all queries are maxima, as far as the host can tell at once."""
    if mask is None or x.shape[1] <= MEAN_UP_TO:
        return x.shape[1] > MEAN_UP_TO
    seen = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return seen and bool((count > MEAN_UP_TO).all())
