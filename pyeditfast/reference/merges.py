"""The ways to merge shards into one side memory, but for TIES (WISE, arXiv 2405.14768, section
2.3.2 and the published code).

All start from the deltas ``D_s = W'_s − W`` and their weights ``w_s``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeditfast.reference.magnitude_threshold import magnitude_threshold
from pyeditfast.reference.random_mask import random_mask

COLINEAR = 0.9995
"""Above this cosine, spherical interpolation is linear."""


def linear(main: Tensor, sides: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``W + Σ w_s D_s``."""
    return main + sum(w * (side - main) for w, side in zip(weights, sides, strict=True))


def slerp(main: Tensor, sides: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the shards' mean on the sphere: each in turn is interpolated into the mean so far, by
    its share of the weights up to it.

    ``main`` plays no part.
    """
    merged, total = sides[0].clone(), weights[0]
    for side, weight in zip(sides[1:], weights[1:], strict=True):
        total += weight
        merged = interpolate(merged, side, weight / total)
    return merged


def interpolate(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the point at ``t`` on the arc from ``a`` to ``b``, seen as vectors."""
    norms = a.norm() * b.norm()
    cosine = (a * b).sum() / norms if norms > 0 else torch.ones_like(norms)
    if cosine.abs() > COLINEAR:
        return (1.0 - t) * a + t * b
    angle = torch.arccos(cosine)
    return (torch.sin((1.0 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def magnitude(
    main: Tensor, sides: Sequence[Tensor], weights: Sequence[float], density: float
) -> Tensor:
    """Return ``W + Σ w_s D_s`` over the ``density`` largest magnitudes of every ``D_s``."""
    return main + sum(
        w * _largest(main, side, density) for w, side in zip(weights, sides, strict=True)
    )


def magnitude_norm(
    main: Tensor, sides: Sequence[Tensor], weights: Sequence[float], density: float
) -> Tensor:
    """Return ``magnitude`` with the weights scaled to add up to 1."""
    total = sum(weights)
    return magnitude(main, sides, [weight / total for weight in weights], density)


def sign(main: Tensor, sides: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``W`` plus the weighted mean of the ``D_s`` of the elected sign."""
    deltas = [side - main for side in sides]
    kept, share = _of_elected_sign(deltas, weights)
    return main + kept / torch.where(share == 0, 1.0, share)


def dare_linear(
    main: Tensor, sides: Sequence[Tensor], weights: Sequence[float], density: float, seed: int
) -> Tensor:
    """Return ``W + Σ w_s D_s`` over a random part ``density`` of every ``D_s``.

    As published, what is left is not scaled up.
    """
    return main + sum(
        w * delta for w, delta in zip(weights, _random(main, sides, density, seed), strict=True)
    )


def dare_ties(
    main: Tensor, sides: Sequence[Tensor], weights: Sequence[float], density: float, seed: int
) -> Tensor:
    """Return ``W`` plus the weighted sum of the ``D_s`` of the elected sign, over a random part
    ``density`` of every ``D_s``, scaled up by ``1 / density``.
    """
    deltas = [delta / density for delta in _random(main, sides, density, seed)]
    return main + _of_elected_sign(deltas, weights)[0]


def _largest(main: Tensor, side: Tensor, density: float) -> Tensor:
    delta = side - main
    return delta.where(delta.abs() >= magnitude_threshold(side, density, base=main), 0.0)


def _random(main: Tensor, sides: Sequence[Tensor], density: float, seed: int) -> list[Tensor]:
    return [
        (side - main).where(random_mask(seed + s, density, main.shape, device=main.device), 0.0)
        for s, side in enumerate(sides)
    ]


def _of_elected_sign(deltas: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the deltas of the elected sign, and the sum of their weights."""
    total = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    assert isinstance(total, Tensor)
    positive = total >= 0
    kept, share = torch.zeros_like(total), torch.zeros_like(total)
    for weight, delta in zip(weights, deltas, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        kept += torch.where(agrees, weight * delta, 0.0)
        # Not torch.where(agrees, weight, 0.0): of two numbers it is float32 beside float64 deltas.
        share += weight * agrees.to(share.dtype)
    return kept, share
