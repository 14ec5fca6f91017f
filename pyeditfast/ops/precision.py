"""Matrix products that keep every bit of float32, whatever the user's matmul flags say."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""Elements of a block that is worth a product of its own: at most 8 MB."""


def reduced_float32(device: torch.device) -> bool:
    """Say whether torch may compute float32 products on ``device`` in TF32 or bfloat16."""
    flags = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return flags.matmul.fp32_precision not in ("none", "ieee")


def exact_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a product keeps the precision of ``dtype`` (float32 or float64).

    Where the user allows reduced float32 products, whose error would swamp a ridge of 1, that is
    float64.
    """
    return torch.float64 if dtype == torch.float32 and reduced_float32(device) else dtype


def exact_matmul(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``a @ b`` in ``dtype`` (float32 or float64), never through TF32 or bfloat16.

    Operands of 16 bits are converted first: their products are exact in float32.
    """
    operand = exact_dtype(a.device, dtype)
    # Under autocast the product would be bfloat16.
    with torch.autocast(a.device.type, enabled=False):
        return (a.to(operand) @ b.to(operand)).to(dtype)


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``out`` (float32 or float64) in place, as ``exact_matmul`` would.

    Operands that have the dtype of ``out`` already cost no memory where ``out`` is a matrix.
    """
    if out.ndim != 2 or exact_dtype(out.device, out.dtype) != out.dtype:
        out += exact_matmul(a, b, out.dtype)
    else:
        # Autocast leaves what works in place alone.
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def block_rows(width: int, beside: int = 0) -> int:
    """Return how many rows of ``width`` elements make a block: a 16th of ``width × width``, or
    ``BLOCK_ELEMENTS`` with what is ``beside`` each row, whichever is more.
    """
    return max(width // 16, BLOCK_ELEMENTS // max(width + beside, 1), 1)


def row_blocks(dtype: torch.dtype, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of rows of ``tensors`` ``[..., n, d]`` that may be converted to ``dtype`` one
    after another; all the rows at once where nothing needs to be converted.

    A block has the ``block_rows`` of the first tensor's width. The blocks are views: what a
    generator converts is alive until the next one is.
    """
    n, (width, *others) = tensors[0].shape[-2], [tensor.shape[-1] for tensor in tensors]
    ready = all(tensor.dtype == dtype for tensor in tensors)
    rows = max(n, 1) if ready else block_rows(width, sum(others))
    yield from zip(*(tensor.split(rows, dim=-2) for tensor in tensors), strict=True)
