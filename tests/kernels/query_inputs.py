"""Inputs of the kernels for whole prompts: queries, memories, masks and gates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from decode_inputs import weights_of
from ops.layouts import random_rows
from torch import Tensor

from pyeditfast_kernels import memory_products
from pyeditfast_kernels.launch import Config

CONFIGS = (
    *memory_products.HOPPER,
    *memory_products.HOPPER_GATED,
    *memory_products.GENERAL,
    *memory_products.FEW_ROWS,
    *memory_products.FEW_ROWS_GATED,
    *memory_products.FINE,
)

REDUCTIONS = ("mean", "max", "auto")


def config_of(rows: int, columns: int, depth: int) -> Config:
    """Return a small configuration, so that small inputs have several tiles."""
    sizes = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "BLOCK_K": depth, "PIECE": 16}
    return Config("small", sizes, num_warps=4, num_stages=2, why="for tests")


SMALL = config_of(32, 32, 32)
LARGE = config_of(128, 16, 16)


@dataclass(frozen=True)
class Queries:
    """Arguments of ``activation_gap`` and, with thresholds, of ``routed_linear``."""

    x: Tensor
    main: Tensor
    sides: list[Tensor]
    bias: Tensor | None = None
    mask: Tensor | None = None
    gate: Tensor | None = None

    def to(self, place: torch.device | torch.dtype) -> Queries:
        """Return the same numbers on another device or in another dtype."""

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(entry) for entry in value]
            if value is None or (isinstance(place, torch.dtype) and value.dtype == torch.bool):
                return value
            return value.to(place)

        return Queries(*(moved(value) for value in vars(self).values()))

    def but(self, **changes: Any) -> Queries:
        """Return the same with some arguments changed."""
        return replace(self, **changes)


def queries(
    batch: int,
    tokens: int,
    d_in: int,
    d_out: int,
    sides: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = False,
    masked: bool = False,
    gated: bool = False,
    scale: float = 1.0,
) -> Queries:
    """Return random queries, half of whose tokens are masked where ``masked``."""
    main, others = weights_of(sides, d_out, d_in, dtype, device)
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    return Queries(
        random_rows(batch, tokens, d_in, seed=7, scale=scale).to(device, dtype),
        main,
        others,
        random_rows(d_out, seed=3).to(device, dtype) if bias else None,
        mask.to(device) if masked else None,
        random_rows(batch, tokens, d_in, seed=8).to(device, dtype) if gated else None,
    )
