"""TIES: trim, elect signs, merge (Yadav et al. 2023, arXiv 2306.01708), as WISE uses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeditfast.reference.magnitude_threshold import magnitude_threshold


def ties_merge(
    main: Tensor,
    sides: Sequence[Tensor],
    density: float,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Return the side memory that ``sides`` merge into, in the dtype of ``main``.

    Of each ``D_s = W'_s − W`` the ``density`` largest magnitudes are kept, with all that tie with
    the smallest kept; every element's sign is that of ``Σ w_s D_s`` (0 counts as +); the kept
    ``D_s`` of that sign are averaged by their weights, which are ``1/S`` unless given, and added to
    ``W``.
    """
    work = torch.float64 if main.dtype == torch.float64 else torch.float32
    weights = [1.0 / len(sides)] * len(sides) if weights is None else weights
    centre = main.to(work)
    deltas = []
    for side in sides:
        delta = side.to(work) - centre
        threshold = magnitude_threshold(side, density, base=main)
        deltas.append(torch.where(delta.abs() >= threshold, delta, 0.0))
    total = torch.zeros_like(centre)
    for weight, delta in zip(weights, deltas, strict=True):
        total += weight * delta
    positive = total >= 0
    kept = torch.zeros_like(centre)
    share = torch.zeros_like(centre)
    for weight, delta in zip(weights, deltas, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        kept += torch.where(agrees, weight * delta, 0.0)
        share += weight * agrees.to(share.dtype)
    return (centre + kept / torch.where(share == 0, 1.0, share)).to(main.dtype)
