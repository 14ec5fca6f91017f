"""Weights, gradients and settings for the tests of the masked step."""

from __future__ import annotations

from typing import Any

import torch
from ops.layouts import random_rows
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SHAPES = ((1, 1), (1, 7), (7, 1), (13, 31), (9, 4), (64, 64), (65, 66), (70, 132), (101, 203))

STEP: dict[str, Any] = {
    "seed": 2**64 - 3,
    "ratio": 0.2,
    "lr": 0.7,
    "weight_decay": 0.01,
    "norm_constraint": 0.02,
    "active": None,
}
"""Settings under which about a tenth of the elements meets the constraint."""


def matrices(
    d_out: int, d_in: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return a weight and the main memory near it."""
    main = random_rows(d_out, d_in, seed=1, scale=0.02)
    weight = main + random_rows(d_out, d_in, seed=2, scale=0.01)
    return weight.to(device, dtype), main.to(device, dtype)


def gradient(d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a gradient that is not small beside the weights."""
    return random_rows(d_out, d_in, seed=3, scale=0.02).to(device, dtype)
