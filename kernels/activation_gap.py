"""Activation gaps of queries, ``g = reduce_t ‖ act(W' x_t + b) − act(W x_t + b) ‖₂``.

``x`` ``[batch, tokens, d_in]``, ``main`` and one to eight ``sides`` ``[d_out, d_in]``, all of any
strides, in bf16, fp16 or float32; gaps ``[batch, sides]`` float32. ``memory_products`` computes all
memories' outputs tile by tile, keeps none of them, and leaves squared distances by column tile and
row. A second kernel, with a program for each query and side, adds those up in order, takes the root
and the mean or the maximum over the tokens that count.

Floor: that of ``memory_products`` without outputs. The distances are ``4 · sides · rows`` bytes a
column tile, written and read once, mostly in L2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.launch import Config, Example, launch
from pyeditfast_kernels.memory_products import (
    choose_config,
    is_hopper,
    memory_products,
    memory_products_kernel,
)
from pyeditfast_kernels.memory_tile import in_one_layout
from pyeditfast_kernels.modules import aligned

SHORT = Config(
    "64 tokens, 32 tiles",
    {"BLOCK_TOKENS": 64, "BLOCK_TILES": 32},
    num_warps=4,
    num_stages=1,
    why="prompts of a sentence: a program of a query's own, all its loads under way at once",
)
LONG = Config(
    "512 tokens, 16 tiles",
    {"BLOCK_TOKENS": 512, "BLOCK_TILES": 16},
    num_warps=8,
    num_stages=1,
    why="long prompts, of which there may be only one: 32 loads a thread under way at once",
)
SHORT_UP_TO = 128

MEAN_UP_TO = tl.constexpr(100)
"""With the reduction "auto" a query of more counted tokens has the maximum for its gap."""


@triton.jit(do_not_specialize=["rows", "tokens", "column_tiles"])
def query_gaps_kernel(
    distances,
    mask,
    gaps,
    rows,
    tokens,
    column_tiles,
    mask_stride_batch,
    mask_stride_token,
    SIDES: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    query = (tl.program_id(0) // SIDES).to(tl.int64)
    side = tl.program_id(0) % SIDES
    sums = tl.zeros((BLOCK_TOKENS,), tl.float32)
    largest = tl.zeros((BLOCK_TOKENS,), tl.float32)
    counts = tl.zeros((BLOCK_TOKENS,), tl.int32)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
        counted = token < tokens
        if mask is not None:
            flags = mask + (query * mask_stride_batch + token.to(tl.int64) * mask_stride_token)
            counted = tl.load(flags, mask=counted, other=0) != 0
        squares = tl.zeros((BLOCK_TOKENS,), tl.float32)
        for first in range(0, column_tiles, BLOCK_TILES):
            tile = first + tl.arange(0, BLOCK_TILES).to(tl.int64)
            place = ((tile * SIDES + side) * rows)[:, None] + (query * tokens + token)[None, :]
            inside = (tile < column_tiles)[:, None] & counted[None, :]
            # What does not count is not read, so that no NaN in it is.
            squares += tl.sum(tl.load(distances + place, mask=inside, other=0.0), 0)
        gap = tl.sqrt_rn(squares)
        sums += gap
        largest = tl.maximum(largest, gap)
        counts += counted.to(tl.int32)
    total = tl.sum(sums, 0)
    count = tl.sum(counts, 0)
    result = total / tl.maximum(count, 1).to(tl.float32)
    if REDUCTION != "mean":
        # Gaps are not negative: only a NaN among them makes their sum one.
        maximum = tl.where(total == total, tl.max(largest, 0), total)
        result = maximum if REDUCTION == "max" else tl.where(count > MEAN_UP_TO, maximum, result)
    tl.store(gaps + query * SIDES + side, result)


def query_gaps(
    distances: Tensor, batch: int, tokens: int, reduction: str, mask: Tensor | None, gaps: Tensor
) -> None:
    """Write the gaps ``[batch, sides]`` for distances ``[column tiles, sides, batch · tokens]``.

    ``gaps`` is float32 and contiguous, ``mask`` ``[batch, tokens]`` bool or None.
    """
    column_tiles, sides, rows = distances.shape
    strides = (0, 0) if mask is None else mask.stride()
    launch(
        query_gaps_kernel,
        (batch * sides,),
        SHORT if tokens <= SHORT_UP_TO else LONG,
        distances=distances,
        mask=None if mask is None else mask.view(torch.uint8),
        gaps=gaps,
        rows=rows,
        tokens=tokens,
        column_tiles=column_tiles,
        mask_stride_batch=strides[0],
        mask_stride_token=strides[1],
        SIDES=sides,
        REDUCTION=reduction,
    )


def activation_gap(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    reduction: str,
    mask: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """Return the gaps ``[batch, sides]`` of all queries.

    ``config`` is that of ``choose_config`` unless given.
    """
    main, sides = in_one_layout(main, sides)
    batch, tokens, _ = x.shape
    config = config or choose_config(
        batch * tokens,
        main.shape[0],
        1 + len(sides),
        x.dtype,
        aligned(x, main, *sides),
        activation,
        gated=False,
        hopper=is_hopper(x.device),
    )
    distances = memory_products(x, main, sides, bias, activation, None, None, None, None, config)
    gaps = torch.empty((batch, len(sides)), dtype=torch.float32, device=x.device)
    query_gaps(distances, batch, tokens, reduction, mask, gaps)
    return gaps


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""

    def example(
        name: str,
        batch: int,
        tokens: int,
        sides: int,
        activation: str | None,
        reduction: str,
        masked: bool = False,
        d_in: int = 14336,
        d_out: int = 4096,
    ) -> Example:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]

        def call() -> None:
            x = torch.empty(batch, tokens, d_in, dtype=dtype, device="meta")
            main, *others = torch.empty(1 + sides, d_out, d_in, dtype=dtype, device="meta")
            mask = torch.empty(batch, tokens, dtype=torch.bool, device="meta") if masked else None
            activation_gap(x, main, others, None, activation, reduction, mask)

        words = [name, f"{batch} × {tokens} tokens", f"{sides} sides", str(activation), reduction]
        words += ["masked"] * masked + [f"{d_in} → {d_out}"]
        kernels = (memory_products_kernel.__name__,)
        return Example(", ".join(words), call, kernels, kernels if d_in % 16 == 0 else ())

    return [
        example("bf16", 1, 512, 2, "silu", "auto"),
        example("fp16", 4, 128, 1, "gelu", "auto", masked=True),
        example("bf16", 16, 128, 8, None, "max", masked=True),
        example("bf16", 3, 20, 2, "silu", "mean", masked=True),
        example("fp32", 3, 20, 1, "relu", "auto"),
        example("bf16", 7, 41, 2, "gelu_tanh", "auto", d_in=14335, d_out=4095),
    ]
