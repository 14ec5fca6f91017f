"""The words of Philox4x32-10, four from a block: for blocks, and for the elements of a matrix.

Element ``i`` of a seed's stream is word ``i mod 4`` of block ``i div 4``; the equations are those
of ``pyeditfast.reference.random_mask``, bit by bit. For a counter whose second half is zero a block
is 18 products of 32 × 32 bits and 19 xors.

``PHILOX_BLOCKS``, the launcher's ``blocks_side_by_side``, says how a part ``[ROWS, COLUMNS]`` of a
matrix gets its words. Where every row begins with a block, a thread computes one or two whole
blocks, 4 or 8 elements, as many as it loads at once: joined in that order, their words are where
the elements are, and nothing moves between threads. It is 0 where rows begin inside a block: then
every element has a block computed and takes its own word of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyeditfast_kernels.launch import Config

MULTIPLIER_A = tl.constexpr(0xD2511F53)
MULTIPLIER_B = tl.constexpr(0xCD9E8D57)
KEY_STEP_A = tl.constexpr(0x9E3779B9)
KEY_STEP_B = tl.constexpr(0xBB67AE85)
ROUNDS = tl.constexpr(10)

SCALE = tl.constexpr(4.6566127342e-10)
"""The largest float32 below 2⁻³¹, see the reference."""


@triton.jit
def block_words(seed, block):
    """Return the four words, uint32, of Philox4x32-10 for the counter ``block``, int64 or uint32.

    A counter known to be below 2³² is cheaper as uint32.
    """
    c0 = block.to(tl.uint32)
    c2 = c0 * 0
    c3 = c2
    c1 = (block >> 32).to(tl.uint32) if block.dtype.primitive_bitwidth == 64 else c2
    key = seed.to(tl.uint64)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        # One product of 64 bits is half the work of its halves, one by one.
        a = c0.to(tl.uint64) * MULTIPLIER_A
        b = c2.to(tl.uint64) * MULTIPLIER_B
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 = tl.add(k0, KEY_STEP_A, sanitize_overflow=False)
        k1 = tl.add(k1, KEY_STEP_B, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def word_of(seed, index):
    """Return the word of each element ``index``, int64 or uint32, at the cost of a block each."""
    first, second, third, fourth = block_words(seed, index >> 2)
    number = (index & 3).to(tl.uint32)
    even = tl.where(number == 0, first, third)
    odd = tl.where(number == 1, second, fourth)
    return tl.where((number & 1) == 0, even, odd)


@triton.jit
def in_order(first, second, third, fourth):
    """Return four ``[..., n]`` as ``[..., 4 n]``, an element of each in turn."""
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit
def uniform(word):
    """Return the number in ``[0, 1)``, float32, that a ``word``, uint32, stands for."""
    signed = word.to(tl.int32, bitcast=True)
    return (signed ^ (signed >> 31)).to(tl.float32) * SCALE


@triton.jit
def place_of_part(
    start,
    first_row,
    first_column,
    d_in,
    PHILOX_BLOCKS: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return where a part of a matrix with rows of ``d_in`` takes its words.

    These are every ``PHILOX_BLOCKS``-th block, ``[ROWS, COLUMNS // 4 // PHILOX_BLOCKS]``, or the
    indices of the elements if it is 0; uint32 unless ``FAR``, and int64 then. ``start`` elements
    come before the matrix.
    """
    # Elements that share a block: one, where each has its own.
    SHARING: tl.constexpr = 4 if PHILOX_BLOCKS else 1
    STEP: tl.constexpr = PHILOX_BLOCKS if PHILOX_BLOCKS else 1
    dtype: tl.constexpr = tl.int64 if FAR else tl.uint32
    first = (start + first_row * d_in + first_column) // SHARING
    rows = tl.arange(0, ROWS).to(dtype)[:, None]
    columns = tl.arange(0, COLUMNS // SHARING // STEP).to(dtype)[None, :] * STEP
    return first.to(dtype) + (rows * (tl.cast(d_in, dtype) // SHARING) + columns)


@triton.jit
def words_of_part(
    seed,
    start,
    first_row,
    first_column,
    d_in,
    PHILOX_BLOCKS: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the words, uint32, of a part ``[ROWS, COLUMNS]`` of a matrix with rows of ``d_in``."""
    place = place_of_part(start, first_row, first_column, d_in, PHILOX_BLOCKS, FAR, ROWS, COLUMNS)
    if PHILOX_BLOCKS == 0:
        return word_of(seed, place)
    else:
        first, second, third, fourth = block_words(seed, place)
        if PHILOX_BLOCKS == 2:
            next_first, next_second, next_third, next_fourth = block_words(seed, place + 1)
            first = tl.join(first, next_first)
            second = tl.join(second, next_second)
            third = tl.join(third, next_third)
            fourth = tl.join(fourth, next_fourth)
        return tl.reshape(in_order(first, second, third, fourth), (ROWS, COLUMNS))


def blocks_side_by_side(
    d_in: int, start: int, dtype: torch.dtype, part: int, config: Config
) -> int:
    """Return ``PHILOX_BLOCKS`` for parts of ``part`` elements of a ``dtype`` matrix.

    Its rows have ``d_in`` elements, and ``start`` come before it.
    """
    if d_in % 4 or start % 4:
        return 0
    loaded_at_once = min(16 // dtype.itemsize, part // (32 * config.num_warps))
    return 2 if loaded_at_once >= 8 else 1
