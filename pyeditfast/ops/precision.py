"""Matrix products that keep every bit of float32, whatever the user's matmul flags say."""

from __future__ import annotations

import torch
from torch import Tensor


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
