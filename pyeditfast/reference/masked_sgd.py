"""The step of a side memory: SGD on a random part of its elements, kept near the main memory.

``w ← clamp(w − lr · (mask · g + weight_decay · w), main − c, main + c)`` with
``mask = random_mask(seed, ratio, w.shape)``. Source: WISE (arXiv 2405.14768), section 2.3.2, and
the published code, whose optimizer lets every element decay, masked or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyeditfast.reference.random_mask import random_mask


def masked_sgd_(
    weight: Tensor,
    grad: Tensor,
    main: Tensor,
    *,
    seed: int,
    ratio: float,
    lr: float,
    weight_decay: float = 0.0,
    norm_constraint: float | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Take the step in place on ``weight`` ``[d_out, d_in]`` and return it.

    16-bit tensors are computed in float32 and rounded once. Where ``active`` (a 0-d boolean) is
    False nothing changes.
    """
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    old, centre = weight.to(work), main.to(work)
    mask = random_mask(seed, ratio, weight.shape, device=weight.device)
    new = old - lr * (grad.to(work).masked_fill(~mask, 0.0) + weight_decay * old)
    if norm_constraint is not None:
        new = torch.minimum(torch.maximum(new, centre - norm_constraint), centre + norm_constraint)
    if active is not None:
        new = torch.where(active, new, old)
    return weight.copy_(new)


def masked_sgd_product_(
    weight: Tensor,
    output_grads: Tensor,
    inputs: Tensor,
    main: Tensor,
    *,
    seed: int,
    ratio: float,
    lr: float,
    weight_decay: float = 0.0,
    norm_constraint: float | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Take the step for the gradient ``dYᵀ X`` of a linear module: ``output_grads`` ``[n, d_out]``,
    ``inputs`` ``[n, d_in]``.
    """
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    grad = output_grads.to(work).T @ inputs.to(work)
    return masked_sgd_(
        weight,
        grad,
        main,
        seed=seed,
        ratio=ratio,
        lr=lr,
        weight_decay=weight_decay,
        norm_constraint=norm_constraint,
        active=active,
    )
