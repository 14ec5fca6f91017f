"""A matrix as what differs from another, bit for bit.

A side memory has the main memory's bits wherever the mask left it alone (in 16 bits the weight
decay changes nothing there), so that this takes about a quarter of the room.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def encode(matrix: Tensor, base: Tensor) -> dict[str, Tensor]:
    """Return ``where``, one bit for each element in row-major order (uint8, padded with zeros), and
    ``values``, the elements of ``matrix`` that differ from ``base`` (same shape and dtype).
    """
    own, other = matrix.detach().cpu().contiguous(), base.detach().cpu().contiguous()
    differs = (_bits(own) != _bits(other)).flatten()
    where = np.packbits(differs.numpy())
    return {"where": torch.from_numpy(where), "values": own.flatten()[differs]}


def decode(encoded: dict[str, Tensor], base: Tensor) -> Tensor:
    """Return the matrix that ``encode`` saw, on the device of ``base``.

    Raises ``ValueError`` where the parts do not fit together or do not fit ``base``.
    """
    where, values = encoded["where"], encoded["values"]
    if where.numel() != -(-base.numel() // 8) or values.dtype != base.dtype:
        raise ValueError(
            f"a difference of {8 * where.numel()} elements ({values.dtype}) does not fit a matrix "
            f"{tuple(base.shape)} ({base.dtype})"
        )
    differs = torch.from_numpy(np.unpackbits(where.cpu().numpy(), count=base.numel()).astype(bool))
    if int(differs.sum()) != values.numel():
        raise ValueError(
            f"a difference has {values.numel()} values for {int(differs.sum())} places"
        )
    matrix = base.detach().cpu().clone(memory_format=torch.contiguous_format)
    matrix.view(-1)[differs] = values.cpu()
    return matrix.to(base.device)


def _bits(tensor: Tensor) -> Tensor:
    # As integers: -0.0 equals 0.0 and NaN does not equal itself.
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.element_size()])
