"""Merging shards into one side memory, by any of the published ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeditfast.ops.magnitude_threshold import check_density
from pyeditfast.ops.memories import check_memories
from pyeditfast.ops.ties_merge import check_weights, ties_merge
from pyeditfast.reference import merges

MERGES = (
    "ties",
    "linear",
    "slerp",
    "magnitude",
    "magnitude_norm",
    "sign",
    "dare_linear",
    "dare_ties",
)


def merge(
    main: Tensor,
    sides: Sequence[Tensor],
    algorithm: str = "ties",
    *,
    density: float = 0.53,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the side memory ``[d_out, d_in]`` that ``sides`` merge into, in the dtype of ``main``.

    ``main`` and each of ``sides`` ``[d_out, d_in]``, of one dtype; ``weights`` are ``1/S`` unless
    given. ``density`` is the part of each difference from ``main`` that ``"ties"``,
    ``"magnitude"``, ``"magnitude_norm"`` and both ``"dare"`` ways keep; ``seed`` draws the part
    that the last two keep. Computed in float32 (float64 for float64) and rounded once. Unlike the
    published code, ``"linear"`` and ``"slerp"`` take in every shard and not the first alone. Raises
    ``ValueError`` for an unknown algorithm or arguments that do not fit.
    """
    if algorithm not in MERGES:
        raise ValueError(f"algorithm is {algorithm!r}; choose one of {', '.join(MERGES)}")
    if algorithm == "ties":
        return ties_merge(main, sides, density, weights)
    check_memories(main, sides)
    if not sides:
        raise ValueError("sides is empty; at least one side memory is needed")
    weights = check_weights(weights, len(sides))
    check_density(density, main.numel())
    work = torch.float64 if main.dtype == torch.float64 else torch.float32
    centre, memories = main.to(work), [side.to(work) for side in sides]
    if algorithm == "linear":
        merged = merges.linear(centre, memories, weights)
    elif algorithm == "slerp":
        merged = merges.slerp(centre, memories, weights)
    elif algorithm == "magnitude":
        merged = merges.magnitude(centre, memories, weights, density)
    elif algorithm == "magnitude_norm":
        merged = merges.magnitude_norm(centre, memories, weights, density)
    elif algorithm == "sign":
        merged = merges.sign(centre, memories, weights)
    elif algorithm == "dare_linear":
        merged = merges.dare_linear(centre, memories, weights, density, seed)
    else:
        merged = merges.dare_ties(centre, memories, weights, density, seed)
    return merged.to(main.dtype)
