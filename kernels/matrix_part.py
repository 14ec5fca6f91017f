"""What kernels share that work on matrices element by element, ``[ROWS, COLUMNS]`` at a time.

The first row and column of such a part are int64; strides may be anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyeditfast_kernels.apply_shift import narrowed
from pyeditfast_kernels.tile_product import to_bfloat16


@triton.jit
def offsets_of(
    first_row,
    first_column,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the offsets of a part's elements."""
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None]
    columns = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    first = first_row * stride_row + first_column * stride_column
    return first + (rows * stride_row + columns * stride_column)


@triton.jit
def inside_of(first_row, first_column, d_out, d_in, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Say which elements of a part lie in a matrix ``[d_out, d_in]``."""
    rows = first_row + tl.arange(0, ROWS)[:, None]
    columns = first_column + tl.arange(0, COLUMNS)[None, :]
    return (rows < d_out) & (columns < d_in)


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the float32 ``x`` in ``dtype``, the nearest, ties to even."""
    if dtype == tl.bfloat16:
        nearest = to_bfloat16(x, INTERPRETED)
        return narrowed(nearest, dtype) if INTERPRETED else nearest
    else:
        return x.to(dtype)


@triton.jit
def rounded_product(x, factor, INTERPRETED: tl.constexpr):
    """Return the float32 ``x · factor``, rounded before anything is added to it."""
    if INTERPRETED:
        return x * factor
    else:
        # A plain product becomes a part of a fused multiply-add, libdevice's makes tiny numbers 0.
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, factor], tl.float32, is_pure=True, pack=1
        )
