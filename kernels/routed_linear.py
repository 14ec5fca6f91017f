"""A linear module with side memories, ``y = x W_rᵀ + b`` with a route ``r`` for every query.

``x`` ``[batch, tokens, d_in]``, ``main`` and one to eight ``sides`` ``[d_out, d_in]``, all of any
strides, in bf16, fp16 or float32. With a gate, of the shape of x, the input is ``act(gate) · x``:
the down projection of a gated feed-forward block (see ``memory_products`` for its price).

**The route is decided here** (the prefill of a prompt). A query's route needs all its tokens and
all columns, and no output can be chosen before it. Ways out, for 512 tokens, 14336 → 4096 and two
sides (180 GFLOP and 370 MB: 0.24 ms at 750 TFLOP/s) on an H200, by count, not measured:

1. multiply with the main memory, then with the routed side: up to a third more work, 80 µs;
2. hold the sums of all tiles in registers until a grid-wide barrier: no launch, but only for
   outputs that fit the chip's registers, and no second program on a multiprocessor;
3. write the outputs of all memories, then choose: 13 MB written and up to 8 MB moved, most of it
   in L2, and two small launches: under 10 µs.

It is 3. Three kernels: ``memory_products`` writes the main memory's outputs to their place and the
sides' beside it; ``query_gaps_kernel`` reduces the distances; ``select_kernel`` decides and moves
the outputs of routed queries, and nothing for the others. The sides' outputs are at most
``MOST_BESIDE`` bytes, or those of one query: a larger batch is worked off in parts.

**The route is given**: every tile multiplies its rows with the memories that they are routed to,
and reads no others. Floor: ``2 rows · d_in · d_out`` FLOPs, the memories in use read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.activation_gap import query_gaps, query_gaps_kernel
from pyeditfast_kernels.activations import activation_name
from pyeditfast_kernels.launch import Config, Example, interprets, launch
from pyeditfast_kernels.memory_products import (
    FEW_ROWS_UP_TO,
    PROGRAMS_AT_ONCE,
    choose_config,
    is_hopper,
    load_bias,
    memory_products,
    memory_products_kernel,
)
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

SELECT = Config(
    "8 tokens, 1024 columns",
    {"BLOCK_TOKENS": 8, "BLOCK_COLUMNS": 1024},
    num_warps=8,
    num_stages=1,
    why="four loads of 16 bytes a thread; 256 programs for 512 tokens of 4096 columns",
)

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

MOST_BESIDE = 1 << 28
"""Bytes of the side memories' outputs that are held at once."""


@triton.jit(do_not_specialize=["tokens", "token_blocks", "column_blocks"])
def select_kernel(
    gaps,
    thresholds,
    side_outputs,
    output,
    route,
    queries,
    tokens,
    d_out,
    token_blocks,
    column_blocks,
    thresholds_stride,
    SIDES: tl.constexpr,
    PADDED_SIDES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Decide the route of a query, note it, and move its block of a side memory's outputs."""
    column_block = tl.program_id(0) % column_blocks
    token_block = tl.program_id(0) // column_blocks % token_blocks
    query = (tl.program_id(0) // column_blocks // token_blocks).to(tl.int64)
    side = tl.arange(0, PADDED_SIDES)
    is_side = side < SIDES
    gap = tl.load(gaps + query * SIDES + side, mask=is_side, other=0.0)  # [PADDED_SIDES]
    threshold = tl.load(thresholds + side * thresholds_stride, mask=is_side, other=0.0)
    # A NaN is above nothing, and the first of equals is chosen.
    above = is_side & (gap > threshold)
    largest = tl.max(tl.where(above, gap, float("-inf")), 0)
    first = tl.min(tl.where(above & (gap == largest), side, PADDED_SIDES), 0)
    chosen = tl.where(first < PADDED_SIDES, first, -1).to(tl.int64)
    if column_block + token_block == 0:
        tl.store(route + query, chosen)
    if chosen >= 0:
        token = token_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        mask = (token < tokens)[:, None] & (column < d_out)[None, :]
        place = (query * tokens + token)[:, None] * d_out + column[None, :]
        beside = chosen * queries * tokens * d_out
        tl.store(output + place, tl.load(side_outputs + beside + place, mask=mask), mask=mask)


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


def routed_linear(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    thresholds: Tensor,
    bias: Tensor | None,
    activation: str | None,
    reduction: str,
    mask: Tensor | None,
    gate: Tensor | None,
    gate_activation: str | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide the routes and return outputs, routes and gaps.

    The output is ``[batch, tokens, d_out]`` in the dtype of x, the route ``[batch]`` int64 with −1
    for the main memory, the gaps ``[batch, sides]`` float32; ``thresholds`` ``[sides]``. ``config``
    is that of ``choose_config`` unless given.
    """
    main, sides = in_one_layout(main, sides)
    batch, tokens, _ = x.shape
    d_out = main.shape[0]
    output = torch.empty((batch, tokens, d_out), dtype=x.dtype, device=x.device)
    route = torch.empty((batch,), dtype=torch.int64, device=x.device)
    gaps = torch.empty((batch, len(sides)), dtype=torch.float32, device=x.device)
    a_query = len(sides) * tokens * d_out
    at_once = min(batch, max(1, MOST_BESIDE // max(1, a_query * x.dtype.itemsize)))
    beside = torch.empty(at_once * a_query, dtype=x.dtype, device=x.device)
    inputs = [x] if gate is None else [x, gate]
    config = config or choose_config(
        at_once * tokens,
        d_out,
        1 + len(sides),
        x.dtype,
        aligned(*inputs, main, *sides),
        activation,
        gated=gate is not None,
        hopper=is_hopper(x.device),
    )

    def decide(
        x: Tensor, mask: Tensor | None, gate: Tensor | None, output: Tensor, route: Tensor, gaps: Tensor
    ) -> None:
        distances = memory_products(
            x, main, sides, bias, activation, gate, gate_activation, output, beside, config
        )
        queries = x.shape[0]
        query_gaps(distances, queries, tokens, reduction, mask, gaps)
        token_blocks = max(1, triton.cdiv(tokens, SELECT.sizes["BLOCK_TOKENS"]))
        column_blocks = max(1, triton.cdiv(d_out, SELECT.sizes["BLOCK_COLUMNS"]))
        launch(
            select_kernel,
            (queries * token_blocks * column_blocks,),
            SELECT,
            gaps=gaps,
            thresholds=thresholds,
            side_outputs=beside,
            output=output,
            route=route,
            queries=queries,
            tokens=tokens,
            d_out=d_out,
            token_blocks=token_blocks,
            column_blocks=column_blocks,
            thresholds_stride=thresholds.stride(0),
            SIDES=len(sides),
            PADDED_SIDES=triton.next_power_of_2(max(1, len(sides))),
        )

    if at_once == batch:
        decide(x, mask, gate, output, route, gaps)
        return output, route, gaps
    for first in range(0, batch, at_once):
        part = slice(first, first + at_once)
        decide(
            x[part],
            None if mask is None else mask[part],
            None if gate is None else gate[part],
            output[part],
            route[part],
            gaps[part],
        )
    return output, route, gaps


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


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""

    def example(
        name: str,
        batch: int,
        tokens: int,
        sides: int,
        *,
        activation: str | None = "silu",
        gate: str | None = None,
        routed: bool = False,
        layout: str = "Linear",
        d_in: int = 14336,
        d_out: int = 4096,
    ) -> Example:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]

        def call() -> None:
            x = torch.empty(batch, tokens, d_in, dtype=dtype, device="meta")
            shape = (d_out, d_in) if layout == "Linear" else (d_in, d_out)
            memories = torch.empty(1 + sides, *shape, dtype=dtype, device="meta")
            main, *others = memories if layout == "Linear" else memories.mT
            gates = None if gate is None else x
            if routed:
                route = torch.empty(batch, dtype=torch.int64, device="meta")
                routed_linear_with_route(x, main, others, route, None, gates, gate)
            else:
                thresholds = torch.empty(sides, device="meta")
                routed_linear(
                    x, main, others, thresholds, None, activation, "auto", None, gates, gate
                )

        words = [name, f"{batch} × {tokens} tokens", f"{sides} sides"]
        words += ["route given"] if routed else [str(activation)]
        words += [] if gate is None else [f"{gate} gate"]
        words += [layout] if layout != "Linear" else []
        product = routed_product_kernel if routed else memory_products_kernel
        kernels = (product.__name__,)
        wide = kernels if d_in % 16 == 0 else ()
        if not routed and d_out % 16 == 0:
            wide += (select_kernel.__name__,)
        return Example(", ".join([*words, f"{d_in} → {d_out}"]), call, kernels, wide)

    return [
        example("bf16", 1, 512, 1),
        example("bf16", 1, 512, 2),
        example("bf16", 1, 512, 2, gate="silu"),
        example("bf16", 1, 512, 2, layout="Conv1D"),
        example("bf16", 1, 512, 8),
        example("fp16", 1, 128, 2, activation="gelu_tanh"),
        example("bf16", 3, 20, 2),
        example("bf16", 3, 20, 2, gate="silu"),
        example("bf16", 3, 20, 8, activation=None),
        example("bf16", 3, 20, 8, gate="gelu_tanh", activation="gelu_tanh"),
        example("fp32", 1, 512, 2),
        example("fp32", 1, 512, 8, gate="silu"),
        example("bf16", 7, 41, 2, d_in=14335, d_out=4095),
        example("bf16", 8, 64, 2, routed=True),
        example("bf16", 8, 64, 2, routed=True, gate="silu"),
        example("bf16", 8, 64, 2, routed=True, layout="Conv1D"),
        example("fp16", 2, 64, 2, routed=True),
        example("bf16", 3, 20, 8, routed=True),
        example("bf16", 3, 20, 2, routed=True, gate="silu"),
        example("fp32", 8, 64, 2, routed=True, gate="gelu"),
        example("bf16", 7, 41, 2, routed=True, d_in=14335, d_out=4095),
    ]
