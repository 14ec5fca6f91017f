"""Gram matrix of keys: ``G = K Kᵀ + ridge · I`` (the dual form of UltraEdit's normal equations)."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(keys: Tensor, ridge: float = 0.0) -> Tensor:
    """Return ``K Kᵀ + ridge · I``, ``[..., n, n]`` in the dtype of ``keys`` ``[..., n, d_in]``."""
    identity = torch.eye(keys.shape[-2], dtype=keys.dtype, device=keys.device)
    return keys @ keys.mT + ridge * identity
