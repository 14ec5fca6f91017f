"""Merging shards into one side memory by TIES."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, backend, choose, triton_candidate
from pyeditfast.ops.compiled import as_matrix, compiled, compiled_for, cpp_candidate
from pyeditfast.ops.magnitude_threshold import check_density, magnitude_threshold
from pyeditfast.ops.memories import check_memories, taking

CANDIDATES = (
    triton_candidate("ties_merge"),
    cpp_candidate("ties_merge"),
    Candidate("torch", always),
    Candidate("reference", always),
)

CHUNK_ELEMENTS = 2 << 20
"""Elements of a memory that are held in float32 at a time."""


def ties_merge(
    main: Tensor,
    sides: Sequence[Tensor],
    density: float,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Return the side memory ``[d_out, d_in]`` that ``sides`` merge into, in the dtype of ``main``.

    ``main`` and each of ``sides`` ``[d_out, d_in]``, of one dtype. Of each ``D_s = W'_s − W`` the
    ``density`` largest magnitudes are kept (``magnitude_threshold``), with all that tie with the
    smallest kept; an element's sign is that of ``Σ w_s D_s``, 0 counting as +; the kept ``D_s`` of
    that sign are averaged by their ``weights`` (``1/S`` unless given) and added to ``W``. All is
    computed in float32 (float64 for float64), in the order of ``sides``, and rounded once. Raises
    ``TypeError`` or ``ValueError`` for arguments that do not fit.

    Floor: all memories read and one written, after the passes for the thresholds. TIES (arXiv
    2306.01708) as in WISE (arXiv 2405.14768).
    """
    check_memories(main, sides)
    if not sides:
        raise ValueError("sides is empty; at least one side memory is needed")
    weights = check_weights(weights, len(sides))
    check_density(density, main.numel())
    candidates = compiled_for(taking(CANDIDATES, main, sides), main.dtype)
    chosen = choose("ties_merge", candidates, main.device)
    if chosen == "reference":
        return reference.ties_merge(main, sides, density, weights)
    # There is no Triton form of the thresholds; whoever asks for this one takes any of theirs.
    with backend("auto") if chosen == "triton" else contextlib.nullcontext():
        thresholds = torch.stack([magnitude_threshold(side, density, base=main) for side in sides])
    if chosen == "triton":
        from pyeditfast_kernels.ties_merge import ties_merge as launch

        return launch(main, sides, thresholds, torch.tensor(weights, device=main.device))
    out = torch.empty_like(main)
    if chosen == "cpp":
        compiled().ties_merge(
            out=as_matrix(out),
            main=as_matrix(main),
            sides=[as_matrix(side) for side in sides],
            thresholds=thresholds.tolist(),
            weights=weights,
            rows=main.shape[0],
            columns=main.shape[1],
            threads=torch.get_num_threads(),
        )
        return out
    step = max(1, CHUNK_ELEMENTS // main.shape[1])
    for start in range(0, main.shape[0], step):
        rows = slice(start, start + step)
        out[rows] = _merged(main[rows], [side[rows] for side in sides], thresholds, weights)
    return out


def check_weights(weights: Sequence[float] | None, memories: int) -> list[float]:
    """Return one finite weight above 0 for each memory, ``1/S`` for None."""
    if weights is None:
        return [1.0 / memories] * memories
    if len(weights) != memories:
        raise ValueError(f"{len(weights)} weights were given for {memories} side memories")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weights holds {weight}; finite numbers above 0 are needed")
    return list(weights)


def _merged(
    main: Tensor, sides: Sequence[Tensor], thresholds: Tensor, weights: Sequence[float]
) -> Tensor:
    work = torch.float64 if main.dtype == torch.float64 else torch.float32
    centre = main.to(work)
    deltas = []
    for side, threshold in zip(sides, thresholds, strict=True):
        delta = side.to(work) - centre
        # Not "below the threshold": NaN is never kept, also where the threshold is NaN.
        deltas.append(delta.masked_fill_(~(delta.abs() >= threshold), 0.0))
    total = torch.zeros_like(centre)
    for weight, delta in zip(weights, deltas, strict=True):
        total.add_(weight * delta)
    positive = total >= 0
    kept = torch.zeros_like(centre)
    share = torch.zeros_like(centre)
    for weight, delta in zip(weights, deltas, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        kept.add_(torch.where(agrees, weight * delta, 0.0))
        share.add_(weight * agrees.to(share.dtype))
    return kept.div_(share.masked_fill_(share == 0, 1.0)).add_(centre)
