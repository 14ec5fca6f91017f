"""TIES as the released WISE code runs it, by ``topk``: the baseline of the merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def published_ties(
    main: Tensor,
    sides: Sequence[Tensor],
    density: float,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Merge side memories ``[...]`` into one as published: trim by ``topk``, elect signs, average.

    Everything is computed in the dtype of ``main``, with all deltas, their weighted forms and their
    masks alive at once. Of elements that tie with the smallest kept magnitude, ``topk`` keeps an
    arbitrary few, so that exactly ``int(density · numel)`` are kept. ``weights`` are ``1/S`` unless
    given.

    Raises:
        ValueError: there are no sides, a shape or the number of weights differs, or the density
            keeps no element.
    """
    weights = [1.0 / len(sides)] * len(sides) if weights is None else list(weights)
    if not sides or len(weights) != len(sides) or any(s.shape != main.shape for s in sides):
        raise ValueError(
            f"sides and weights must match main {tuple(main.shape)}, got sides "
            f"{[tuple(side.shape) for side in sides]} and {len(weights)} weights"
        )
    kept = int(density * main.numel())
    if kept < 1:
        raise ValueError(f"a density of {density} keeps none of {main.numel()} elements")
    deltas = []
    for side in sides:
        delta = side - main
        if density < 1:
            flat = delta.abs().flatten()
            largest = torch.topk(flat.float() if flat.device.type == "cpu" else flat, k=kept)
            trim = torch.zeros_like(delta)
            trim.view(-1)[largest.indices] = 1
            delta = delta * trim
        deltas.append(delta)
    shape = (-1,) + (1,) * main.dim()
    share = torch.tensor(weights, dtype=main.dtype, device=main.device).view(shape)
    weighted = torch.stack(deltas) * share
    elected = (weighted.sum(0) >= 0).to(main.dtype) * 2 - 1
    agrees = weighted.sign() == elected
    divisor = (share * agrees).sum(0)
    divisor[divisor == 0] = 1
    return main + (weighted * agrees).sum(0) / divisor
