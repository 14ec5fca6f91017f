"""What both forms of the masked step share: the mask of a part of a matrix, and the arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl

from pyeditfast_kernels.matrix_part import rounded, rounded_product
from pyeditfast_kernels.philox import place_of_part, word_of
from pyeditfast_kernels.random_mask import bytes_in_order, is_kept, kept_bytes
from pyeditfast_kernels.tile_product import widened


@triton.jit
def mask_of(
    seed,
    last,
    first_row,
    first_column,
    d_in,
    PHILOX_BLOCKS: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return a part ``[ROWS, COLUMNS]`` of the mask of a matrix with rows of ``d_in``."""
    place = place_of_part(0, first_row, first_column, d_in, PHILOX_BLOCKS, FAR, ROWS, COLUMNS)
    kept, kept_next = kept_at(seed, last, place, PHILOX_BLOCKS)
    return element_by_element(kept, kept_next, PHILOX_BLOCKS, ROWS, COLUMNS) != 0


@triton.jit
def masks_of_eight(
    seed,
    last,
    first_row,
    first_column,
    d_in,
    PHILOX_BLOCKS: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the masks of eight parts ``[ROWS, COLUMNS]``, a bit each, the first part's highest.

    Four parts lie below each other, the other four right of them.
    """
    place = place_of_part(0, first_row, first_column, d_in, PHILOX_BLOCKS, FAR, ROWS, COLUMNS)
    SHARING: tl.constexpr = 4 if PHILOX_BLOCKS else 1
    down = ROWS * (tl.cast(d_in, place.dtype) // SHARING)
    up_and_right = COLUMNS // SHARING - 3 * down
    kept = (place * 0).to(tl.int32)
    kept_next = kept
    for part in range(8):
        more, more_next = kept_at(seed, last, place, PHILOX_BLOCKS)
        kept = (kept << 1) | more
        if PHILOX_BLOCKS == 2:
            kept_next = (kept_next << 1) | more_next
        place += tl.where(part == 3, up_and_right, down)
    return element_by_element(kept, kept_next, PHILOX_BLOCKS, ROWS, COLUMNS)


@triton.jit
def kept_at(seed, last, place, PHILOX_BLOCKS: tl.constexpr):
    """Return int32 that ``element_by_element`` makes 1 where a mask keeps an element, else 0.

    ``place`` is what ``place_of_part`` returns.
    """
    if PHILOX_BLOCKS == 0:
        kept = place != place if last is None else is_kept(word_of(seed, place), last)
        return kept.to(tl.int32), kept.to(tl.int32)
    else:
        kept = kept_bytes(seed, place, last)
        return kept, kept_bytes(seed, place + 1, last) if PHILOX_BLOCKS == 2 else kept


@triton.jit
def element_by_element(
    kept, kept_next, PHILOX_BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Return as int32 ``[ROWS, COLUMNS]`` what ``kept_at`` says, a byte an element."""
    if PHILOX_BLOCKS == 0:
        return kept
    elif PHILOX_BLOCKS == 1:
        return bytes_in_order(kept).to(tl.int32)
    else:
        pairs = bytes_in_order(tl.join(kept, kept_next))
        return tl.reshape(pairs, (ROWS, COLUMNS)).to(tl.int32)


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
