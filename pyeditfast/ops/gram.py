"""Gram matrix of keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, choose, fitting, triton_candidate
from pyeditfast.ops.checks import check_ridge, check_rows
from pyeditfast.ops.precision import exact_dtype, exact_matmul

CANDIDATES = (
    triton_candidate("gram"),
    Candidate("torch", always),
    Candidate("reference", always),
)

COLUMNS = 4096
"""Columns of the keys that are converted at a time."""


def gram(keys: Tensor, ridge: float = 0.0, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``K Kᵀ + ridge · I``.

    ``keys`` ``[..., n, d_in]``, any floating dtype; the result is ``[..., n, n]`` in ``dtype``
    (float32 or float64), symmetric up to rounding, and computed without TF32. Raises ``TypeError``
    for a dtype that is not floating point and ``ValueError`` for fewer than two dimensions or a
    negative ridge.

    Floor for one batch item: ``n² d_in`` FLOPs (one triangle), ``n d_in`` elements read, ``4 n²``
    bytes written. The dual form of UltraEdit's normal equations (arXiv 2505.14679).
    """
    check_rows("keys", keys)
    check_ridge(ridge)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}; torch.float32 or torch.float64 is needed")
    chosen = choose("gram", fitting(CANDIDATES, keys.dtype, dtype), keys.device)
    if chosen == "reference":
        return reference.gram(keys.double(), ridge).to(dtype)
    if chosen == "triton":
        from pyeditfast_kernels.gram import gram as launch_gram

        *lead, n, d = keys.shape
        return launch_gram(keys.reshape(math.prod(lead), n, d), ridge).view(*lead, n, n)
    operand = exact_dtype(keys.device, dtype)
    n = keys.shape[-2]
    product = torch.zeros((*keys.shape[:-2], n, n), dtype=operand, device=keys.device)
    # Slice by slice, so that the converted keys are never whole.
    for columns in keys.split(COLUMNS, dim=-1) if keys.dtype != operand else (keys,):
        product += exact_matmul(columns, columns.mT, operand)
    product.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return product.to(dtype)
