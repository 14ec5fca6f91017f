"""TIES: trim, elect signs, average and add, one pass over ``W`` and 1 to 8 shards.

``D_s = W'_s − W``, set to 0 where ``|D_s|`` is below its threshold; an element's sign is that of
``Σ w_s D_s``, 0 counting as +; the result is ``W + Σ w_s D_s / Σ w_s`` over the ``D_s`` of that
sign. ``W`` and every ``W'_s`` ``[d_out, d_in]`` in bf16, fp16 or float32, of any strides each;
thresholds and weights ``[S]`` float32 on the device. All is float32, in the order of the reference
and rounded as there (no fused multiply-adds), and rounded once to the dtype of ``W``.

Floor: ``S + 1`` matrices read and one written. The machine code for sm_90 has about 40 + 16 S
instructions an element, 20 of them for the exact division. On an H200 (132 multiprocessors that
start 128 lanes a cycle, 1.8 GHz, 4 TB/s) two 16-bit shards of 4096 × 14336 should take 120 µs of
memory and 135 µs of instructions, eight 290 µs and 340 µs: estimates, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.launch import Config, Example, interprets, launch
from pyeditfast_kernels.matrix_part import inside_of, offsets_of, rounded, rounded_product
from pyeditfast_kernels.tile_product import widened

MOST_SHARDS = 8

FEW = Config(
    "32 × 64, 4 warps",
    {"BLOCK_OUT": 32, "BLOCK_IN": 64},
    num_warps=4,
    num_stages=1,
    why="16 elements a thread share the addresses; the loads of all shards are in flight together",
)
MANY = Config(
    "32 × 64, 8 warps",
    {"BLOCK_OUT": 32, "BLOCK_IN": 64},
    num_warps=8,
    num_stages=1,
    why="from 5 shards the registers hold the differences of 8 elements; one shard needs no more",
)


def choose_config(shards: int) -> Config:
    """Return the configuration for a number of shards."""
    return FEW if 2 <= shards <= 4 else MANY


@triton.jit(do_not_specialize=["column_tiles"])
def ties_merge_kernel(
    main,
    side_0,
    side_1,
    side_2,
    side_3,
    side_4,
    side_5,
    side_6,
    side_7,
    out,
    thresholds,
    weights,
    d_out,
    d_in,
    column_tiles,
    main_stride_row,
    main_stride_column,
    side_0_stride_row,
    side_0_stride_column,
    side_1_stride_row,
    side_1_stride_column,
    side_2_stride_row,
    side_2_stride_column,
    side_3_stride_row,
    side_3_stride_column,
    side_4_stride_row,
    side_4_stride_column,
    side_5_stride_row,
    side_5_stride_column,
    side_6_stride_row,
    side_6_stride_column,
    side_7_stride_row,
    side_7_stride_column,
    out_stride_row,
    out_stride_column,
    SHARDS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    sides = (side_0, side_1, side_2, side_3, side_4, side_5, side_6, side_7)
    row_strides = (
        side_0_stride_row,
        side_1_stride_row,
        side_2_stride_row,
        side_3_stride_row,
        side_4_stride_row,
        side_5_stride_row,
        side_6_stride_row,
        side_7_stride_row,
    )
    column_strides = (
        side_0_stride_column,
        side_1_stride_column,
        side_2_stride_column,
        side_3_stride_column,
        side_4_stride_column,
        side_5_stride_column,
        side_6_stride_column,
        side_7_stride_column,
    )
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_OUT
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_IN
    inside = inside_of(row, column, d_out, d_in, BLOCK_OUT, BLOCK_IN)
    main += offsets_of(row, column, main_stride_row, main_stride_column, BLOCK_OUT, BLOCK_IN)
    centre = widened(tl.load(main, mask=inside, other=0.0), INTERPRETED).to(tl.float32)
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    deltas = ()
    for shard in tl.static_range(SHARDS):
        offsets = offsets_of(
            row, column, row_strides[shard], column_strides[shard], BLOCK_OUT, BLOCK_IN
        )
        side = tl.load(sides[shard] + offsets, mask=inside, other=0.0)
        delta = widened(side, INTERPRETED).to(tl.float32) - centre
        delta = tl.where(tl.abs(delta) >= tl.load(thresholds + shard), delta, 0.0)
        total += rounded_product(delta, tl.load(weights + shard), INTERPRETED)
        deltas += (delta,)
    # Where the sign is −, all is mirrored: then what is above 0 agrees.
    positive = total >= 0
    kept = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    share = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for shard in tl.static_range(SHARDS):
        weight = tl.load(weights + shard)
        delta = tl.where(positive, deltas[shard], -deltas[shard])
        kept += tl.where(delta > 0, rounded_product(delta, weight, INTERPRETED), 0.0)
        share += tl.where(delta > 0, weight, 0.0)
    kept = tl.where(positive, kept, -kept)
    merged = centre + tl.div_rn(kept, tl.where(share == 0, 1.0, share))
    out += offsets_of(row, column, out_stride_row, out_stride_column, BLOCK_OUT, BLOCK_IN)
    tl.store(out, rounded(merged, dtype, INTERPRETED), mask=inside)


def ties_merge(
    main: Tensor, sides: Sequence[Tensor], thresholds: Tensor, weights: Tensor
) -> Tensor:
    """Return what 1 to 8 ``sides`` merge into, in the dtype of ``main``.

    ``thresholds`` and ``weights`` ``[S]`` are float32, contiguous and on the device of ``main``.
    """
    d_out, d_in = main.shape
    out = torch.empty_like(main)
    config = choose_config(len(sides))
    column_tiles = triton.cdiv(d_in, config.sizes["BLOCK_IN"])
    slots = dict(enumerate(sides))
    shards: dict[str, Tensor | int | None] = {}
    for slot in range(MOST_SHARDS):
        side = slots.get(slot)
        shards[f"side_{slot}"] = side
        shards[f"side_{slot}_stride_row"] = None if side is None else side.stride(0)
        shards[f"side_{slot}_stride_column"] = None if side is None else side.stride(1)
    launch(
        ties_merge_kernel,
        (triton.cdiv(d_out, config.sizes["BLOCK_OUT"]) * column_tiles,),
        config,
        main=main,
        **shards,
        out=out,
        thresholds=thresholds,
        weights=weights,
        d_out=d_out,
        d_in=d_in,
        column_tiles=column_tiles,
        main_stride_row=main.stride(0),
        main_stride_column=main.stride(1),
        out_stride_row=out.stride(0),
        out_stride_column=out.stride(1),
        SHARDS=len(sides),
        INTERPRETED=interprets(),
    )
    return out


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""

    def example(
        shards: int, dtype: torch.dtype, d_out: int, d_in: int, layout: str = "Linear"
    ) -> Example:
        def call() -> None:
            shape = (d_out, d_in) if layout == "Linear" else (d_in, d_out)
            main, *sides = torch.empty(shards + 1, *shape, dtype=dtype, device="meta")
            if layout != "Linear":
                main, sides = main.mT, [side.mT for side in sides]
            ties_merge(main, sides, *torch.empty(2, shards, device="meta"))

        name = f"{shards} {str(dtype).removeprefix('torch.')}, {layout} {d_out} × {d_in}"
        wide = (ties_merge_kernel.__name__,) if d_out % 16 == d_in % 16 == 0 else ()
        return Example(name, call, wide_loads=wide)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        example(1, bf16, 4096, 14336),
        example(2, bf16, 4096, 14336),
        example(4, bf16, 4096, 14336),
        example(8, bf16, 4096, 14336),
        example(2, fp16, 4096, 14336),
        example(4, fp32, 4096, 14336),
        example(8, fp32, 4096, 14336),
        example(2, bf16, 4096, 14336, "Conv1D"),
        example(8, bf16, 4095, 14335),
    ]
