"""The memory that answers a query (WISE, arXiv 2405.14768, section 2.3.1 and WISE-Retrieve)."""

from __future__ import annotations

import torch
from torch import Tensor

MAIN = -1
"""The route of a query that the main memory answers."""


def choose_route(gaps: Tensor, thresholds: Tensor) -> Tensor:
    """Return for each query the side memory with the largest gap among those above their
    threshold, ``-1`` if none is.

    ``gaps`` ``[batch, memories]``, ``thresholds`` ``[memories]``; the route ``[batch]`` is int64.
    Of equal gaps the first counts; a gap of NaN is above no threshold.
    """
    if gaps.shape[-1] == 0:
        return torch.full(gaps.shape[:-1], MAIN, dtype=torch.int64, device=gaps.device)
    above = gaps > thresholds
    best = torch.where(above, gaps, -torch.inf).argmax(-1)
    return torch.where(above.any(-1), best, MAIN)
