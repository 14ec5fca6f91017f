"""Which tile a program computes: orders that let neighbouring programs share their operands in L2.

Programs that run at the same time then cover a nearly square patch of tiles, not a long row.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(8)
"""Rows of a patch; with 132 multiprocessors a patch is 8 × 16 tiles, which needs 24 strips of the
operands where a row of 132 tiles needs 133.
"""


@triton.jit
def grouped_tile(index, row_tiles, column_tiles):
    """Return row and column of tile ``index``: bands of ``GROUP`` rows, column by column."""
    band = index // (GROUP * column_tiles)
    first = band * GROUP
    height = min(row_tiles - first, GROUP)
    within = index - band * GROUP * column_tiles
    return first + within % height, within // height


def triangle_tiles(tiles: int) -> int:
    """Return how many of ``tiles × tiles`` tiles lie on or below the diagonal."""
    return tiles * (tiles + 1) // 2


def triangle_programs(tiles: int) -> int:
    """Return how many programs ``triangle_tile`` needs: a few more than there are tiles."""
    return (tiles + 1) // 2 * (tiles + 1)


@triton.jit
def triangle_tile(index, tiles):
    """Return row and column of the ``index``-th tile on or below the diagonal; row −1 for none.

    Rows ``r`` and ``tiles − 1 − r`` of the triangle together have ``tiles + 1`` tiles, so folding
    the lower half up makes a rectangle, in which whole numbers find the place.
    """
    folded_row, folded_column = grouped_tile(index, (tiles + 1) // 2, tiles + 1)
    length = tiles - folded_row
    if folded_column < length:
        row = length - 1
        column = folded_column
    else:
        # The middle row of an odd number has no partner.
        row = tl.where(folded_row == length - 1, -1, folded_row)
        column = folded_column - length
    return row, column
