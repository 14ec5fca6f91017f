"""Uncentred covariance of keys, accumulated in a stream."""

from __future__ import annotations

import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, choose, fitting, triton_candidate
from pyeditfast.ops.checks import check_rows, check_same_device
from pyeditfast.ops.precision import exact_matmul

CANDIDATES = (
    triton_candidate("covariance"),
    Candidate("torch", always),
    Candidate("reference", always),
)

BLOCK = 2048
"""Columns of one block: wide enough for full matmul speed, narrow enough to skip most of one
triangle.
"""


def covariance(keys: Tensor, out: Tensor | None = None) -> Tensor:
    """Add ``Kᵀ K`` into ``out`` and return it; without ``out``, return a new matrix.

    ``keys`` ``[..., n, d_in]``, any floating dtype; ``out`` symmetric ``[..., d_in, d_in]``,
    float32 or float64, is updated in place, in its own dtype, and stays exactly symmetric. Without
    ``out`` the result is float32. Raises ``TypeError`` for wrong dtypes and ``ValueError`` for
    shapes or devices that do not match.

    Floor for one batch item: ``n d_in²`` FLOPs (one triangle), ``n d_in`` elements read and
    ``d_in²`` read and written. The primal form of UltraEdit's normal equations (arXiv 2505.14679).
    """
    check_rows("keys", keys)
    shape = (*keys.shape[:-2], keys.shape[-1], keys.shape[-1])
    if out is None:
        out = torch.zeros(shape, dtype=torch.float32, device=keys.device)
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out has dtype {out.dtype}; torch.float32 or torch.float64 is needed")
    if out.shape != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; keys {tuple(keys.shape)} need {shape}")
    check_same_device("keys", keys.device, "out", out.device)
    chosen = choose("covariance", fitting(CANDIDATES, keys.dtype, out.dtype), keys.device)
    if chosen == "reference":
        return out.copy_(reference.covariance(keys.double(), out.double()))
    if chosen == "triton":
        from pyeditfast_kernels.covariance import covariance as launch_covariance
        from pyeditfast_kernels.modules import as_modules

        for _, (some_keys, some_out) in as_modules(keys, out):
            launch_covariance(some_keys, some_out)
        return out
    width = keys.shape[-1]
    for start in range(0, width, BLOCK):
        rows = slice(start, min(start + BLOCK, width))
        below = slice(rows.stop, width)
        left = keys[..., rows].mT
        out[..., rows, rows] += _symmetric(exact_matmul(left, keys[..., rows], out.dtype))
        if rows.stop < width:
            out[..., rows, below] += exact_matmul(left, keys[..., below], out.dtype)
            out[..., below, rows] = out[..., rows, below].mT
    return out


def _symmetric(block: Tensor) -> Tensor:
    # A matmul does not promise that both triangles round alike.
    return torch.triu(block) + torch.triu(block, 1).mT
