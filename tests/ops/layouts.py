"""Random rows, and views of them that are not contiguous."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

LAYOUTS = ("contiguous", "transposed", "every second", "inside", "rows first")


def random_rows(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Return normal numbers; the same seed and shape give the same ones in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def empty_storage(shape: Sequence[int], dtype: torch.dtype, layout: str) -> Tensor:
    """Return a tensor full of NaN in which ``view_of`` finds a view of ``shape``."""
    *lead, n, d = shape
    if layout == "transposed":
        shape = (*lead, d, n)
    elif layout == "every second":
        shape = (*lead, 2 * n, 2 * d)
    elif layout == "inside":
        shape = (*lead, n + 2, d + 3)
    elif layout == "rows first" and lead:
        shape = (n, *lead, d)
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def view_of(storage: Tensor, layout: str) -> Tensor:
    """Return the view of what ``empty_storage`` made."""
    if layout == "transposed":
        return storage.mT
    if layout == "every second":
        return storage[..., ::2, ::2]
    if layout == "inside":
        return storage[..., 1:-1, 2:-1]
    if layout == "rows first":
        return storage.movedim(0, -2)
    return storage


def lay_out(tensor: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return a view equal to ``tensor``, and the storage around it, NaN outside the view."""
    storage = empty_storage(tensor.shape, tensor.dtype, layout)
    view = view_of(storage, layout)
    view.copy_(tensor)
    return view, storage


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, so that NaN compares equal to itself."""
    # A tensor of one element counts as contiguous whatever its stride, and keeps it.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return flat.copy_(tensor.reshape(-1)).view(torch.uint8)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Say whether two tensors have one dtype, one shape and the same bits."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(bits(first), bits(second))
