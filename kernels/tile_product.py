"""One tile of a matrix product in float32, for every kernel that multiplies matrices.

``T[i, j] = Σ_k L[i, k] · R[k, j]`` over ``begin ≤ k < end``, on the 16-bit tensor cores. Operands
of bfloat16 or float16 are multiplied as they are: their products are exact in float32. A float32
operand is split into three bfloat16 parts (high, middle, low, each the rounded rest of those
before), whose sum it is. Times bfloat16 that makes three products; of the nine products of two such
operands six are kept (hh, hm, mh, hl, mm, lh): what is left out is below 2⁻²⁴ of the product, and
as often above zero as below.

Tensor cores cut off what does not fit when they add to the accumulator, they do not round (Fasi,
Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021). A sum of 14336
positive terms would lose 2e-5 that way, twenty times what float32 additions lose. So with ``EXACT``
a sum is moved to a second accumulator, by rounded additions, before it grows long.
"""

from __future__ import annotations

import triton
import triton.language as tl

SPAN = tl.constexpr(512)
"""Terms that are summed in the tensor cores before the sum is moved."""

LARGEST_BFLOAT16 = tl.constexpr(3.3895313892515355e38)


@triton.jit
def widened(x, INTERPRETED: tl.constexpr):
    """Return ``x`` fit for ``tl.dot``: in the interpreter bfloat16 becomes float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def to_bfloat16(x, INTERPRETED: tl.constexpr):
    """Round float32 to the nearest bfloat16, ties to even; float32 again in the interpreter."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def split(x, INTERPRETED: tl.constexpr):
    """Return three bfloat16 parts whose sum is the float32 ``x``, if it is finite."""
    # Beyond the largest bfloat16 the high part would be infinite.
    high = to_bfloat16(tl.clamp(x, -LARGEST_BFLOAT16, LARGEST_BFLOAT16), INTERPRETED)
    rest = x - high.to(tl.float32)
    middle = to_bfloat16(rest, INTERPRETED)
    low = to_bfloat16(rest - middle.to(tl.float32), INTERPRETED)
    return high, middle, low


@triton.jit
def add_product(left, right, total, RIGHT_FLOAT32: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return ``total + left @ right`` for a float32 ``left``, the smallest products first."""
    high, middle, low = split(left, INTERPRETED)
    if RIGHT_FLOAT32:
        right_high, right_middle, right_low = split(right, INTERPRETED)
        total = tl.dot(low, right_high, total)
        total = tl.dot(middle, right_middle, total)
        total = tl.dot(high, right_low, total)
        total = tl.dot(middle, right_high, total)
        total = tl.dot(high, right_middle, total)
        total = tl.dot(high, right_high, total)
    else:
        total = tl.dot(low, right, total)
        total = tl.dot(middle, right, total)
        total = tl.dot(high, right, total)
    return total


@triton.jit
def tile_product(
    left,
    right,
    rows,
    columns,
    row_count,
    column_count,
    begin,
    end,
    left_stride_row,
    left_stride_k,
    right_stride_k,
    right_stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return ``Σ left[rows, k] · right[k, columns]`` over ``begin ≤ k < end``.

    ``rows`` ``[BLOCK_ROWS]`` and ``columns`` ``[BLOCK_COLUMNS]`` are int64; those at or beyond
    their counts give zeros. Both operands have one 16-bit dtype, or ``left`` is float32 and
    ``right`` float32 or bfloat16.
    """
    STEPS: tl.constexpr = SPAN // BLOCK_K
    SPLIT: tl.constexpr = left.dtype.element_ty == tl.float32
    SPLIT_BOTH: tl.constexpr = right.dtype.element_ty == tl.float32
    lanes = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    far_lanes = lanes.to(tl.int64)
    left_offsets = (rows * left_stride_row)[:, None] + (far_lanes * left_stride_k)[None, :]
    right_offsets = (far_lanes * right_stride_k)[:, None] + (columns * right_stride_column)[None, :]
    left_rows = (rows < row_count)[:, None]
    right_columns = (columns < column_count)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    partial = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    # At least one step, if only of zeros: a way around the loop makes the compiler wait for every
    # single tensor core instruction on sm_90.
    steps = tl.maximum(tl.cdiv(end - begin, BLOCK_K), 1)
    for step in range(0, steps):
        start = begin + step * BLOCK_K
        inside = start + lanes < end
        far = tl.cast(start, tl.int64)
        a = tl.load(
            left + far * left_stride_k + left_offsets,
            mask=left_rows & inside[None, :],
            other=0.0,
        )  # [BLOCK_ROWS, BLOCK_K]
        b = tl.load(
            right + far * right_stride_k + right_offsets,
            mask=inside[:, None] & right_columns,
            other=0.0,
        )  # [BLOCK_K, BLOCK_COLUMNS]
        a = widened(a, INTERPRETED)
        b = widened(b, INTERPRETED)
        if not SPLIT:
            partial = tl.dot(a, b, partial)
            if EXACT and tl.cast(step, tl.int32) % STEPS == STEPS - 1:
                total += partial
                partial = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        elif EXACT:
            # Many products a step: each step's sum is moved.
            nothing = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            total += add_product(a, b, nothing, SPLIT_BOTH, INTERPRETED)
        else:
            partial = add_product(a, b, partial, SPLIT_BOTH, INTERPRETED)
    if not EXACT:
        total = partial
    elif not SPLIT:
        total += partial
    return total


@triton.jit
def quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return four parts of ``tile`` ``[ROWS, COLUMNS]``, left to right.

    Kernels write their results part by part: the addresses and the numbers of a whole tile together
    do not fit the registers.
    """
    left, right = halves(tile, ROWS, COLUMNS)
    first, second = halves(left, ROWS, COLUMNS // 2)
    third, fourth = halves(right, ROWS, COLUMNS // 2)
    return first, second, third, fourth


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the left and the right half of ``tile`` ``[ROWS, COLUMNS]``."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
