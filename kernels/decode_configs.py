"""How the products of decoding are launched: configurations, and the cut of ``d_in``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeditfast_kernels.launch import Config
from pyeditfast_kernels.modules import aligned
from pyeditfast_kernels.tuned import describe_dtype, tuned_config

WIDE = Config(
    "64 × 128",
    {"BLOCK_OUT": 64, "BLOCK_IN": 128, "BLOCK_ROWS": 16},
    num_warps=4,
    num_stages=4,
    why="256 bytes of a row at a time, and two programs a multiprocessor with 48 KB in flight each",
)
TALL = Config(
    "128 × 64",
    {"BLOCK_OUT": 128, "BLOCK_IN": 64, "BLOCK_ROWS": 16},
    num_warps=4,
    num_stages=4,
    why="the same for a Conv1D weight, whose columns lie side by side",
)
GATED = Config(
    "128 × 64, 8 warps",
    {"BLOCK_OUT": 128, "BLOCK_IN": 64, "BLOCK_ROWS": 16},
    num_warps=8,
    num_stages=4,
    why="the gate's activation is computed once for 128 rows of W, and leaves few registers",
)
FINE = Config(
    "64 × 32, 8 warps",
    {"BLOCK_OUT": 64, "BLOCK_IN": 32, "BLOCK_ROWS": 16},
    num_warps=8,
    num_stages=4,
    why="float32, whose parts fill the registers",
)
ODD = Config(
    "64 × 32, 3 stages",
    {"BLOCK_OUT": 64, "BLOCK_IN": 32, "BLOCK_ROWS": 16},
    num_warps=8,
    num_stages=3,
    why="rows that are not aligned to 16 bytes, which need an address an element",
)
DEEP = Config(
    "64 × 256",
    {"BLOCK_OUT": 64, "BLOCK_IN": 256, "BLOCK_ROWS": 16},
    num_warps=4,
    num_stages=3,
    why="for `make tune`: 512 bytes of a row at a time, half the steps of 64 × 128",
)
LARGE = Config(
    "128 × 128",
    {"BLOCK_OUT": 128, "BLOCK_IN": 128, "BLOCK_ROWS": 16},
    num_warps=8,
    num_stages=3,
    why="for `make tune`: x is read half as often as with 64 rows a tile",
)

CANDIDATES = {
    "bfloat16, Linear": (WIDE, TALL, DEEP, LARGE),
    "bfloat16, Conv1D": (TALL, LARGE),
}
"""By class of shapes, what ``make tune`` chooses from; the first is the default."""

PROGRAMS_AT_ONCE = 264
"""Two for each of an H200's multiprocessors. An estimate that only costs speed where it is wrong,
and the same on every GPU, so that all give the same bits.
"""

START_COST = 256
"""Filling the pipeline costs as much as this many columns of a memory; an estimate."""

FEWEST_COLUMNS = 512
MOST_SPLITS = 32


def choose_config(inputs: Sequence[Tensor], memories: Sequence[Tensor]) -> Config:
    """Return the configuration for ``x`` and, if any, gate, and for all memories: that tuned for
    their device, if any.
    """
    dtype, device = inputs[0].dtype, inputs[0].device
    by_rows = {memory.stride(1) == 1 for memory in memories}
    if len(by_rows) > 1 or not aligned(*inputs, *memories):
        return ODD
    if dtype == torch.float32:
        return FINE
    if len(inputs) > 1:
        return GATED
    layout = "Linear" if by_rows == {True} else "Conv1D"
    tuned = tuned_config("routed_decode", f"{describe_dtype(dtype)}, {layout}", CANDIDATES, device)
    return tuned or (WIDE if layout == "Linear" else TALL)


def choose_splits(tiles: int, d_in: int) -> int:
    """Return into how many parts ``d_in`` is cut for ``tiles`` tiles of rows.

    Minimizes the columns that programs work through one after the other.
    """

    def cost(splits: int) -> float:
        rounds = -(-tiles * splits // PROGRAMS_AT_ONCE)
        return rounds * (d_in / splits + START_COST)

    return min(range(1, max(1, min(MOST_SPLITS, d_in // FEWEST_COLUMNS)) + 1), key=cost)
