"""What both forms of the masked step share: the mask of a part of a matrix, and the arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl

from pyeditfast_kernels.matrix_part import offsets_of, rounded, rounded_product
from pyeditfast_kernels.random_mask import keeps
from pyeditfast_kernels.tile_product import widened


@triton.jit
def mask_of(
    seed,
    last,
    first_row,
    first_column,
    d_in,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return a part ``[ROWS, COLUMNS]`` of the mask of a matrix with rows of ``d_in``."""
    if FAR:
        index = offsets_of(first_row, first_column, d_in, 1, ROWS, COLUMNS)
    else:
        rows = tl.arange(0, ROWS).to(tl.uint32)[:, None]
        columns = tl.arange(0, COLUMNS).to(tl.uint32)[None, :]
        first = (first_row * d_in + first_column).to(tl.uint32)
        index = first + (rows * tl.cast(d_in, tl.uint32) + columns)
    return keeps(seed, index, last)


@triton.jit
def stepped(
    old,
    grad,
    centre,
    kept,
    lr,
    weight_decay,
    norm_constraint,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return what ``old`` becomes, in ``dtype``; ``kept`` says where the mask keeps ``grad``."""
    old = widened(old, INTERPRETED).to(tl.float32)
    direction = tl.where(kept, widened(grad, INTERPRETED).to(tl.float32), 0.0)
    direction += rounded_product(old, weight_decay, INTERPRETED)
    new = old - rounded_product(direction, lr, INTERPRETED)
    if norm_constraint is not None:
        centre = widened(centre, INTERPRETED).to(tl.float32)
        # As torch does: what is not a number stays so.
        new = tl.maximum(new, centre - norm_constraint, propagate_nan=tl.PropagateNan.ALL)
        new = tl.minimum(new, centre + norm_constraint, propagate_nan=tl.PropagateNan.ALL)
    return rounded(new, dtype, INTERPRETED)
