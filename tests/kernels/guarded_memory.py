"""New tensors that are full of NaN and have canaries on both sides.

A kernel that leaves an element out, or writes past an end, would otherwise pass unseen: new memory
often holds the last test's right answer, and in Triton's interpreter a stray store raises nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CANARY = -12288.0
"""A number that every floating dtype holds exactly."""

MARGIN = 1024
"""Elements on either side; a multiple of 16 bytes, so that tensors keep their alignment."""

_empty = torch.empty


class GuardedMemory:
    """Stands in for ``torch.empty`` and ``torch.empty_like`` for floating dtypes."""

    def __init__(self) -> None:
        self._storages: list[Tensor] = []

    def empty(self, *size: Any, **options: Any) -> Tensor:
        """Return a contiguous tensor full of NaN; takes what ``torch.empty`` takes."""
        plain = _empty(*size, **options)
        if plain.device.type == "meta" or not plain.is_floating_point():
            return plain
        storage = torch.full(
            (plain.numel() + 2 * MARGIN,), CANARY, dtype=plain.dtype, device=plain.device
        )
        self._storages.append(storage)
        return storage[MARGIN : MARGIN + plain.numel()].fill_(math.nan).view(plain.shape)

    def empty_like(self, tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return a contiguous tensor of the shape of ``tensor``, full of NaN."""
        return self.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)

    def check(self) -> None:
        """Fail if anything was written outside the tensors."""
        for storage in self._storages:
            margins = torch.cat([storage[:MARGIN], storage[-MARGIN:]])
            assert bool((margins == CANARY).all()), f"a kernel wrote beside {storage.numel()}"
