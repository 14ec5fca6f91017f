"""Inputs of the decode kernels: single tokens, memories and routes."""

from __future__ import annotations

import math

import torch
from ops.layouts import empty_storage, random_rows, view_of
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

ACTIVATIONS = (None, "silu", "gelu", "gelu_tanh", "relu")

EXTREMES = [
    (torch.float32, 1e15, 1e15),
    (torch.float32, 1e-15, 1e-15),
    (torch.bfloat16, 1e15, 1e15),
    (torch.bfloat16, 1e-15, 1e-15),
    (torch.float16, 6e3, 1.0),
    (torch.float16, 1e-2, 1e-2),
]
"""A dtype, the scale of the tokens and that of the memories."""


def weights_of(
    memories: int, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device, scale=1.0
) -> tuple[Tensor, list[Tensor]]:
    """Return a main memory and side memories that differ from it by a third."""
    unit = scale / math.sqrt(max(1, d_in))
    main = random_rows(d_out, d_in, seed=99, scale=unit)
    changes = [
        random_rows(d_out, d_in, seed=number, scale=0.3 * unit) for number in range(memories)
    ]
    sides = [main + change for change in changes]
    return main.to(device, dtype), [side.to(device, dtype) for side in sides]


def tokens(
    batch: int, d_in: int, dtype: torch.dtype, device: torch.device, seed: int = 7, scale=1.0
) -> Tensor:
    return random_rows(batch, 1, d_in, seed=seed, scale=scale).to(device, dtype)


def routes(batch: int, memories: int, device: torch.device) -> Tensor:
    """Return routes in which neighbours differ and, with rows enough, all memories occur."""
    return ((torch.arange(batch) * 5) % (memories + 1) - 1).to(device)


def strided(tensors: list[Tensor], layout: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return views equal to tokens ``[batch, 1, d_in]`` and memories, and the storages around."""
    matrices = [tensor[:, 0] if tensor.ndim == 3 else tensor for tensor in tensors]
    storages = [
        empty_storage(matrix.shape, matrix.dtype, layout).to(matrix.device) for matrix in matrices
    ]
    views = []
    for tensor, matrix, storage in zip(tensors, matrices, storages, strict=True):
        view = view_of(storage, layout).copy_(matrix)
        views.append(view[:, None] if tensor.ndim == 3 else view)
    return views, storages
