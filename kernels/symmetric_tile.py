"""A tile of a symmetric matrix, written on both sides of the diagonal."""

from __future__ import annotations

import triton
import triton.language as tl

from pyeditfast_kernels.tile_product import quarters


@triton.jit
def mirror_diagonal(tile, BLOCK: tl.constexpr):
    """Return a ``[BLOCK, BLOCK]`` tile of the diagonal with the lower triangle on both sides.

    A product need not give both triangles the same bits.
    """
    lanes = tl.arange(0, BLOCK)
    return tl.where(lanes[:, None] >= lanes[None, :], tile, tl.trans(tile))


@triton.jit
def store_symmetric(
    matrix,
    tile,
    tile_row,
    tile_column,
    size,
    stride_row,
    stride_column,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write, or add, a ``[BLOCK, BLOCK]`` tile and its transpose to ``matrix`` ``[size, size]``."""
    parts = quarters(tile, BLOCK, BLOCK)
    first_row = tile_row.to(tl.int64) * BLOCK
    for quarter in tl.static_range(4):
        _store_part(
            matrix,
            parts[quarter],
            tile_row != tile_column,
            first_row,
            tile_column.to(tl.int64) * BLOCK + quarter * (BLOCK // 4),
            size,
            stride_row,
            stride_column,
            ADD,
            BLOCK,
            BLOCK // 4,
        )


@triton.jit
def _store_part(
    matrix,
    part,
    mirror,
    first_row,
    first_column,
    size,
    stride_row,
    stride_column,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None]
    columns = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    inside = (first_row + rows < size) & (first_column + columns < size)
    place = matrix + first_row * stride_row + first_column * stride_column
    place += rows * stride_row + columns * stride_column
    if ADD:
        part += tl.load(place, mask=inside, other=0.0)
    tl.store(place, part, mask=inside)
    if mirror:
        place = matrix + first_column * stride_row + first_row * stride_column
        place += columns * stride_row + rows * stride_column
        tl.store(place, part, mask=inside)
