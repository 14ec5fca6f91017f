"""The product of rows with the memories that they are routed to, ``y = x W_rᵀ + b``.

``x`` ``[batch, tokens, d_in]``, ``main`` and up to eight ``sides`` ``[d_out, d_in]``, all of any
strides, in bf16, fp16 or float32; ``route`` ``[batch]`` int64, a side's number, else the main
memory. With a gate, of the shape of x, the input is ``act(gate) · x``, rounded once to the dtype of
x and never written.

There is a program for every tile and memory. Those whose rows are all routed elsewhere end at once,
so that every row is computed once and no memory is read that is not in use.

Floor: ``2 rows · d_in · d_out`` FLOPs on the tensor cores (six times that for float32), x and the
memories in use read once, ``rows · d_out`` elements written. Tiles that hold queries of several
routes are worked on once for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.activations import activation_name
from pyeditfast_kernels.launch import Config, interprets, launch
from pyeditfast_kernels.memory_products import FEW_ROWS_UP_TO, PROGRAMS_AT_ONCE, load_bias
from pyeditfast_kernels.memory_tile import (
    add_tile_product,
    in_one_layout,
    load_input,
    memory_pointer,
    parts_of,
    rounded,
    side_arguments,
    strides_of_input,
)
from pyeditfast_kernels.modules import aligned
from pyeditfast_kernels.tile_order import grouped_tile
from pyeditfast_kernels.tile_product import widened

WIDE = Config(
    "128 × 128, 64 deep",
    {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_K": 64},
    num_warps=8,
    num_stages=3,
    why="64 FLOPs a byte read from L2, and two programs share a multiprocessor of sm_90",
)
NARROW = Config(
    "128 × 64, 64 deep",
    {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 64, "BLOCK_K": 64},
    num_warps=8,
    num_stages=3,
    why="too few tiles of 128 columns to fill the chip",
)
FEW_ROWS = Config(
    "64 × 32, 128 deep",
    {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 32, "BLOCK_K": 128},
    num_warps=4,
    num_stages=4,
    why="the memories are read once, by as many programs as there can be",
)
FEW_ROWS_GATED = Config(
    "64 × 32, 64 deep",
    {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 32, "BLOCK_K": 64},
    num_warps=4,
    num_stages=5,
    why="as without a gate; x and gate together take more room",
)
FINE = Config(
    "64 × 64, 32 deep",
    {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_K": 32},
    num_warps=8,
    num_stages=3,
    why="float32, whose parts fill the registers, and rows that are not aligned to 16 bytes",
)


def choose_routed_config(
    rows: int, d_out: int, dtype: torch.dtype, is_aligned: bool, gated: bool
) -> Config:
    """Return the configuration for ``rows`` rows whose route is given."""
    if dtype == torch.float32 or not is_aligned:
        return FINE
    if rows <= FEW_ROWS_UP_TO:
        return FEW_ROWS_GATED if gated else FEW_ROWS
    tiles = triton.cdiv(rows, 128) * triton.cdiv(d_out, 128)
    return WIDE if tiles >= PROGRAMS_AT_ONCE else NARROW


@triton.jit(do_not_specialize=["rows", "tokens", "row_tiles", "column_tiles", "bias_size"])
def routed_product_kernel(
    x,
    gate,
    main,
    side_0,
    side_1,
    side_2,
    side_3,
    side_4,
    side_5,
    side_6,
    side_7,
    bias,
    route,
    output,
    bias_size,
    rows,
    tokens,
    d_in,
    d_out,
    row_tiles,
    column_tiles,
    x_stride_batch,
    x_stride_token,
    x_stride_d,
    gate_stride_batch,
    gate_stride_token,
    gate_stride_d,
    memory_stride_out,
    memory_stride_in,
    bias_stride,
    route_stride,
    SIDES: tl.constexpr,
    GATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply those rows of a tile that are routed to one memory; there is a program for each."""
    dtype: tl.constexpr = x.dtype.element_ty
    tiles = row_tiles * column_tiles
    number = tl.program_id(0) // tiles
    tile_row, tile_column = grouped_tile(tl.program_id(0) % tiles, row_tiles, column_tiles)
    first_row = tile_row.to(tl.int64) * BLOCK_ROWS
    first_column = tile_column.to(tl.int64) * BLOCK_COLUMNS
    row_lanes = tl.arange(0, BLOCK_ROWS)
    row = first_row + row_lanes  # [BLOCK_ROWS]
    side = tl.load(route + row // tokens * route_stride, mask=row < rows, other=-1)
    routed_to = tl.where((side >= 0) & (side < SIDES), side + 1, 0)
    mine = (row < rows) & (routed_to == number)
    if tl.max(mine.to(tl.int32), 0) == 0:
        return
    lanes = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    far_lanes = lanes.to(tl.int64)
    starts = (row // tokens) * x_stride_batch + (row % tokens) * x_stride_token
    x_pointers = x + (starts[:, None] + (far_lanes * x_stride_d)[None, :])
    gate_pointers = x_pointers
    if GATE is not None:
        starts = (row // tokens) * gate_stride_batch + (row % tokens) * gate_stride_token
        gate_pointers = gate + (starts[:, None] + (far_lanes * gate_stride_d)[None, :])
    pointers = memory_pointer(
        number, main, side_0, side_1, side_2, side_3, side_4, side_5, side_6, side_7
    )
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    inside_columns = (column < d_out)[None, :]
    pointers += (far_lanes * memory_stride_in)[:, None] + (column * memory_stride_out)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(0, tl.maximum(tl.cdiv(d_in, BLOCK_K), 1)):
        inside = step * BLOCK_K + lanes < d_in
        far = tl.cast(step, tl.int64) * BLOCK_K
        a = load_input(
            x_pointers + far * x_stride_d,
            gate_pointers + far * gate_stride_d,
            mine[:, None] & inside[None, :],
            GATE,
            INTERPRETED,
        )  # [BLOCK_ROWS, BLOCK_K]
        mask = inside[:, None] & inside_columns
        b = widened(tl.load(pointers + far * memory_stride_in, mask=mask, other=0.0), INTERPRETED)
        total = add_tile_product(a, b, total, dtype == tl.float32, INTERPRETED)
    target = output + (first_row * d_out + first_column)
    PIECE: tl.constexpr = BLOCK_COLUMNS // 4
    parts = parts_of(total, 4)
    for piece in tl.static_range(4):
        lane = piece * PIECE + tl.arange(0, PIECE)
        column = first_column + lane
        y = parts[piece] + load_bias(bias, bias_stride, column, bias_size, INTERPRETED)
        tl.store(
            target + (row_lanes[:, None] * d_out + lane[None, :]),
            rounded(y, dtype, INTERPRETED),
            mask=mine[:, None] & (column < d_out)[None, :],
        )


def routed_linear_with_route(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    route: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_activation: str | None,
    config: Config | None = None,
) -> Tensor:
    """Return the outputs ``[batch, tokens, d_out]`` for a given ``route`` ``[batch]`` int64.

    Numbers that name no side memory mean the main memory. ``config`` is that of
    ``choose_routed_config`` unless given.
    """
    main, sides = in_one_layout(main, sides)
    batch, tokens, d_in = x.shape
    d_out = main.shape[0]
    output = torch.empty((batch, tokens, d_out), dtype=x.dtype, device=x.device)
    rows = batch * tokens
    inputs = [x] if gate is None else [x, gate]
    is_aligned = aligned(*inputs, main, *sides)
    gated = gate is not None
    config = config or choose_routed_config(rows, d_out, x.dtype, is_aligned, gated)
    row_tiles = triton.cdiv(rows, config.sizes["BLOCK_ROWS"])
    column_tiles = triton.cdiv(d_out, config.sizes["BLOCK_COLUMNS"])
    launch(
        routed_product_kernel,
        ((1 + len(sides)) * row_tiles * column_tiles,),
        config,
        x=x,
        gate=gate,
        main=main,
        **side_arguments(sides),
        bias=main if bias is None else bias,
        route=route,
        output=output,
        bias_size=0 if bias is None else d_out,
        rows=rows,
        tokens=tokens,
        d_in=d_in,
        d_out=d_out,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        **strides_of_input("x", x),
        **strides_of_input("gate", gate),
        memory_stride_out=main.stride(0),
        memory_stride_in=main.stride(1),
        bias_stride=1 if bias is None else bias.stride(0),
        route_stride=route.stride(0),
        SIDES=len(sides),
        GATE=None if gate is None else activation_name(gate_activation),
        INTERPRETED=interprets(),
    )
    return output
