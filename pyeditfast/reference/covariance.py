"""Uncentred covariance of keys: ``C = Kᵀ K`` (the primal form of UltraEdit's normal equations)."""

from __future__ import annotations

from torch import Tensor


def covariance(keys: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``out + Kᵀ K``, ``[..., d_in, d_in]``, for ``keys`` ``[..., n, d_in]``."""
    product = keys.mT @ keys
    return product if out is None else out + product
