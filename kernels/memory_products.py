"""The products of an input with the main memory and all side memories, tile by tile in one program.

``x`` ``[batch, tokens, d_in]`` of any strides, memories ``[d_out, d_in]``; of the
``rows = batch · tokens`` outputs ``y_s = x W_sᵀ + b`` a program computes the same tile for all
memories, main first, so that x is read once and the gap needs no second pass:
``distances[c, s, r] = Σ_j (act(y_s[r, j]) − act(y_0[r, j]))²`` over the columns ``j`` of column
tile ``c``, float32. ``query_gaps_kernel`` adds them up in order. The outputs are written where they
are wanted: those of the main memory to ``output``, those of the sides to ``side_outputs``.

Floor for M sides: ``2 (1 + M) rows · d_in · d_out`` FLOPs on the tensor cores (six times that for
float32), x and the memories read once, ``(1 + M) rows · d_out`` elements written, or none.

Equal columns of several memories stand side by side in one operand, ``[BLOCK_K, memories ·
BLOCK_COLUMNS]``, which keeps the tensor core instructions wide. An operand's columns are a power of
two: the largest that the memories fill is the first, the rest a second.

With a gate the product ``act(gate) · x`` is made anew by every column tile and never written. That
is ``rows · d_in · d_out / BLOCK_COLUMNS`` activations: hidden behind the memories' bytes for a few
rows; for 512 rows, 14336 → 4096 and tiles of 128 columns 235 million, 0.13 ms of an H200's special
function units beside 0.24 ms of its tensor cores, where to write the product once and read it would
take about 0.01 ms. Counted, not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.activations import activate, activation_name
from pyeditfast_kernels.launch import Config, interprets, launch
from pyeditfast_kernels.memory_tile import (
    add_tile_product,
    load_input,
    memory_pointer,
    parts_of,
    rounded,
    side_arguments,
    strides_of_input,
)
from pyeditfast_kernels.tile_order import grouped_tile
from pyeditfast_kernels.tile_product import widened


def _config(rows: int, columns: int, depth: int, warps: int, stages: int, piece: int, why: str):
    sizes = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "BLOCK_K": depth, "PIECE": piece}
    name = f"{rows} × {columns}, {depth} deep, {piece} at a time"
    return Config(name, sizes, num_warps=warps, num_stages=stages, why=why)


HOPPER = tuple(
    _config(128, columns, 64, 8, 3, 16, why)
    for columns, why in (
        (128, "three memories: 96 FLOPs a byte from L2, 128 tiles for 512 rows of 4096 outputs"),
        (64, "up to six memories, or too few tiles of 128 columns"),
        (32, "up to nine memories, or too few tiles of 64 columns"),
    )
)
"""For compute capability 9, which has the shared memory, and multiplies from there."""

HOPPER_GATED = tuple(
    _config(128, columns, 32, 8, 4, 16, "half as deep: the gated input passes the registers")
    for columns in (128, 64, 32)
)

GENERAL = tuple(
    _config(128, columns, 32, 8, 4, min(32, columns), "256 columns fit 99 KB, and the registers")
    for columns in (128, 64, 32, 16)
)

FEW_ROWS = tuple(
    _config(64, columns, 64, 4, 4, columns, "the memories are read once, by many programs")
    for columns in (32, 16)
)

FEW_ROWS_GATED = tuple(
    _config(64, columns, 32, 4, 5, columns, "as without a gate; x and gate take more room")
    for columns in (32, 16)
)

FINE = tuple(
    _config(64, columns, depth, 8, 3, columns, "float32's parts and unaligned rows fill registers")
    for columns, depth in ((32, 32), (16, 16))
)

FEW_ROWS_UP_TO = 64

PROGRAMS_AT_ONCE = 120
"""Fewer leave too much of an H200's 132 multiprocessors idle; an estimate."""


def groups(memories: int) -> tuple[int, int]:
    """Return how many memories the first and the second operand hold.

    Seven take the room of eight, since three operands would be needed otherwise.
    """
    first = 1 << (memories.bit_length() - 1)
    second = memories - first
    return (first, second) if second & (second - 1) == 0 else (2 * first, 0)


def choose_config(
    rows: int,
    d_out: int,
    memories: int,
    dtype: torch.dtype,
    is_aligned: bool,
    activation: str | None,
    gated: bool,
    hopper: bool,
) -> Config:
    """Return the configuration for ``memories`` memories, the main one counted.

    The widest tiles whose sums fit the registers beside the activation (the normal distribution
    needs many), unless they are too few to fill the chip.
    """
    room = sum(groups(memories))
    if dtype == torch.float32 or not is_aligned:
        return FINE[room > 4]
    if rows <= FEW_ROWS_UP_TO:
        return (FEW_ROWS_GATED if gated else FEW_ROWS)[room > 4]
    if hopper:
        family, most = (HOPPER_GATED if gated else HOPPER), 384
    else:
        family, most = GENERAL, 256
    if activation == "gelu":
        most -= most // 4
    fitting = [config for config in family if room * config.sizes["BLOCK_COLUMNS"] <= most]
    for config in fitting:
        column_tiles = triton.cdiv(d_out, config.sizes["BLOCK_COLUMNS"])
        if triton.cdiv(rows, 128) * column_tiles >= PROGRAMS_AT_ONCE:
            return config
    return fitting[-1]


def is_hopper(device: torch.device) -> bool:
    """Say whether ``device`` is a GPU of compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@triton.jit(do_not_specialize=["rows", "tokens", "row_tiles", "column_tiles", "bias_size"])
def memory_products_kernel(
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
    output,
    side_outputs,
    distances,
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
    SIDES: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    FLOAT32: tl.constexpr = dtype == tl.float32
    FIRST_COLUMNS: tl.constexpr = FIRST * BLOCK_COLUMNS
    SECOND_COLUMNS: tl.constexpr = SECOND * BLOCK_COLUMNS
    PIECES: tl.constexpr = BLOCK_COLUMNS // PIECE
    tile_row, tile_column = grouped_tile(tl.program_id(0), row_tiles, column_tiles)
    first_row = tile_row.to(tl.int64) * BLOCK_ROWS
    first_column = tile_column.to(tl.int64) * BLOCK_COLUMNS
    row_lanes = tl.arange(0, BLOCK_ROWS)
    row = first_row + row_lanes  # [BLOCK_ROWS]
    inside_rows = (row < rows)[:, None]
    lanes = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    far_lanes = lanes.to(tl.int64)

    starts = (row // tokens) * x_stride_batch + (row % tokens) * x_stride_token
    x_pointers = x + (starts[:, None] + (far_lanes * x_stride_d)[None, :])
    gate_pointers = x_pointers
    if GATE is not None:
        starts = (row // tokens) * gate_stride_batch + (row % tokens) * gate_stride_token
        gate_pointers = gate + (starts[:, None] + (far_lanes * gate_stride_d)[None, :])

    wide = tl.arange(0, FIRST_COLUMNS)
    column = first_column + wide % BLOCK_COLUMNS
    pointers = memory_pointer(
        (wide // BLOCK_COLUMNS)[None, :],
        main,
        side_0,
        side_1,
        side_2,
        side_3,
        side_4,
        side_5,
        side_6,
        side_7,
    )
    pointers += (far_lanes * memory_stride_in)[:, None] + (column * memory_stride_out)[None, :]
    inside_columns = (column < d_out)[None, :]
    total = tl.zeros((BLOCK_ROWS, FIRST_COLUMNS), tl.float32)
    if SECOND > 0:
        wide = tl.arange(0, SECOND_COLUMNS)
        column = first_column + wide % BLOCK_COLUMNS
        more_pointers = memory_pointer(
            (FIRST + wide // BLOCK_COLUMNS)[None, :],
            main,
            side_0,
            side_1,
            side_2,
            side_3,
            side_4,
            side_5,
            side_6,
            side_7,
        )
        more_pointers += (far_lanes * memory_stride_in)[:, None]
        more_pointers += (column * memory_stride_out)[None, :]
        more_inside_columns = (column < d_out)[None, :]
        more_total = tl.zeros((BLOCK_ROWS, SECOND_COLUMNS), tl.float32)
    # At least one step, if only of zeros, as in tile_product.
    for step in range(0, tl.maximum(tl.cdiv(d_in, BLOCK_K), 1)):
        inside = step * BLOCK_K + lanes < d_in
        far = tl.cast(step, tl.int64) * BLOCK_K
        a = load_input(
            x_pointers + far * x_stride_d,
            gate_pointers + far * gate_stride_d,
            inside_rows & inside[None, :],
            GATE,
            INTERPRETED,
        )  # [BLOCK_ROWS, BLOCK_K]
        mask = inside[:, None] & inside_columns
        b = tl.load(pointers + far * memory_stride_in, mask=mask, other=0.0)
        total = add_tile_product(a, widened(b, INTERPRETED), total, FLOAT32, INTERPRETED)
        if SECOND > 0:
            mask = inside[:, None] & more_inside_columns
            b = tl.load(more_pointers + far * memory_stride_in, mask=mask, other=0.0)
            b = widened(b, INTERPRETED)
            more_total = add_tile_product(a, b, more_total, FLOAT32, INTERPRETED)

    # Pieces of columns, since a whole tile's differences do not fit the registers beside the sums;
    # and each behind a load, if only a masked one, since what does not wait for one is computed for
    # all pieces at once.
    pieces = parts_of(total, FIRST * PIECES)
    if SECOND > 0:
        pieces += parts_of(more_total, SECOND * PIECES)
    sums = ()
    for _ in tl.static_range(SIDES):
        sums += (tl.zeros((BLOCK_ROWS,), tl.float32),)
    for piece in tl.static_range(PIECES):
        column = first_column + piece * PIECE + tl.arange(0, PIECE)  # [PIECE]
        shift = load_bias(bias, bias_stride, column, bias_size, INTERPRETED)
        centre = activate(pieces[piece] + shift, ACTIVATION)  # [BLOCK_ROWS, PIECE]
        new_sums = ()
        for side in tl.static_range(SIDES):
            y = pieces[(side + 1) * PIECES + piece]
            difference = activate(y + shift, ACTIVATION) - centre
            squares = tl.where((column < d_out)[None, :], difference * difference, 0.0)
            new_sums += (sums[side] + tl.sum(squares, 1),)
        sums = new_sums
    for side in tl.static_range(SIDES):
        place = (tile_column.to(tl.int64) * SIDES + side) * rows + row
        tl.store(distances + place, sums[side], mask=row < rows)

    if output is not None:
        # A pass of its own: with the activations' numbers the outputs' addresses do not fit.
        tl.debug_barrier()
        corner = first_row * d_out + first_column
        for number in tl.static_range(SIDES + 1):
            if number == 0:
                target = output + corner
            else:
                target = side_outputs + (tl.cast(rows, tl.int64) * d_out * (number - 1) + corner)
            for piece in tl.static_range(PIECES):
                y = pieces[number * PIECES + piece]
                lane = piece * PIECE + tl.arange(0, PIECE)
                column = first_column + lane
                y += load_bias(bias, bias_stride, column, bias_size, INTERPRETED)
                tl.store(
                    target + (row_lanes[:, None] * d_out + lane[None, :]),
                    rounded(y, dtype, INTERPRETED),
                    mask=inside_rows & (column < d_out)[None, :],
                )


@triton.jit
def load_bias(bias, stride, column, bias_size, INTERPRETED: tl.constexpr):
    """Return the bias of ``column`` as a row ``[1, …]``, zeros from ``bias_size`` on."""
    shift = tl.load(bias + column * stride, mask=column < bias_size, other=0.0)
    return widened(shift, INTERPRETED).to(tl.float32)[None, :]


def memory_products(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    gate_activation: str | None,
    output: Tensor | None,
    side_outputs: Tensor | None,
    config: Config,
) -> Tensor:
    """Return the distances ``[column tiles, sides, batch · tokens]`` and write the outputs.

    ``output`` ``[batch, tokens, d_out]`` and ``side_outputs`` ``[sides, batch, tokens, d_out]`` are
    contiguous, or both None. The memories have equal strides.
    """
    batch, tokens, d_in = x.shape
    d_out = main.shape[0]
    rows = batch * tokens
    row_tiles = triton.cdiv(rows, config.sizes["BLOCK_ROWS"])
    column_tiles = triton.cdiv(d_out, config.sizes["BLOCK_COLUMNS"])
    first, second = groups(1 + len(sides))
    distances = torch.empty((column_tiles, len(sides), rows), dtype=torch.float32, device=x.device)
    launch(
        memory_products_kernel,
        (row_tiles * column_tiles,),
        config,
        x=x,
        gate=gate,
        main=main,
        **side_arguments(sides),
        bias=main if bias is None else bias,
        output=output,
        side_outputs=side_outputs,
        distances=distances,
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
        SIDES=len(sides),
        FIRST=first,
        SECOND=second,
        ACTIVATION=activation_name(activation),
        GATE=None if gate is None else activation_name(gate_activation),
        INTERPRETED=interprets(),
    )
    return distances
