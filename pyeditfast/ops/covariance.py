"""Uncentred covariance of keys, accumulated in a stream."""

from __future__ import annotations

import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, choose, fitting, triton_candidate
from pyeditfast.ops.checks import check_rows, check_same_device
from pyeditfast.ops.precision import add_product_, exact_dtype, exact_matmul, row_blocks

CANDIDATES = (
    triton_candidate("covariance"),
    Candidate("torch", always),
    Candidate("reference", always),
)

BLOCK = 512
"""Columns of one block: 1.3 times faster on a core than 2048 at widths of 4096 and 8192, since less
of the other triangle is computed, and with temporaries a 16th as large; 256 gains little more and
takes twice the products.
"""


def covariance(keys: Tensor, out: Tensor | None = None) -> Tensor:
    """Add ``Kᵀ K`` into ``out`` and return it; without ``out``, return a new matrix.

    ``keys`` ``[..., n, d_in]``, any floating dtype; ``out`` symmetric ``[..., d_in, d_in]``,
    float32 or float64, is updated in place, in its own dtype, and stays exactly symmetric. Without
    ``out`` the result is float32. Raises ``TypeError`` for wrong dtypes and ``ValueError`` for
    shapes or devices that do not match.

    Floor for one batch item: ``n d_in²`` FLOPs (one triangle), ``n d_in`` elements read and
    ``d_in²`` read and written. The torch backend needs room for ``d_in² / 16`` elements (8 MB at
    the least) where keys have to be converted, and for a batch ``BLOCK · d_in`` for a product. The
    primal form of UltraEdit's normal equations (arXiv 2505.14679).
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
    strips = _strips(keys.shape[-1])
    operand = exact_dtype(keys.device, out.dtype)
    for (some_keys,) in row_blocks(operand, keys):
        _add_upper_triangle_(out, some_keys.to(operand), strips)
    for rows, beyond in strips:
        out[..., beyond, rows] = out[..., rows, beyond].mT
    return out


def _add_upper_triangle_(out: Tensor, keys: Tensor, strips: list[tuple[slice, slice]]) -> None:
    for rows, beyond in strips:
        left = keys[..., rows].mT
        out[..., rows, rows] += _symmetric(exact_matmul(left, keys[..., rows], out.dtype))
        add_product_(out[..., rows, beyond], left, keys[..., beyond])


def _strips(width: int) -> list[tuple[slice, slice]]:
    """Return the columns of each block, and those beyond it."""
    starts = range(0, width, BLOCK)
    stops = [min(start + BLOCK, width) for start in starts]
    return [(slice(a, b), slice(b, width)) for a, b in zip(starts, stops, strict=True)]


def _symmetric(block: Tensor) -> Tensor:
    # A matmul does not promise that both triangles round alike.
    block = block.triu_()
    return block.add_(block.triu(1).mT)
