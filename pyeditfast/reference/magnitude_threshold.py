"""The k-th largest magnitude of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_elements(numel: int, density: float) -> int:
    """Return how many of ``numel`` elements a ``density`` keeps, as TIES counts them."""
    return int(density * numel)


def magnitude_threshold(x: Tensor, density: float, *, base: Tensor | None = None) -> Tensor:
    """Return the k-th largest ``|x − base|`` with ``k = int(density · numel)``, 0-d.

    16-bit tensors are subtracted in float32, which is what is returned.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    magnitude = x.to(work) if base is None else x.to(work) - base.to(work)
    return (
        magnitude.abs()
        .flatten()
        .sort(descending=True)
        .values[kept_elements(x.numel(), density) - 1]
    )
