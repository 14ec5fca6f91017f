"""Philox masks and uniform numbers, functions of a seed and an element's index.

``mask[i] = u(seed, offset + i) < ratio`` as bytes, and ``u`` itself as float32, for elements ``i``
of any shape, row-major; the equations are those of ``pyeditfast.reference.random_mask``, bit by
bit. Other kernels compute their part of a mask with ``kept_bytes``, so that none is stored.

A mask needs no floating-point numbers: ``u`` grows with the folded word ``min(w, 2^32 − 1 − w)``,
so the launcher finds the last one whose ``u`` is below the ratio, and the kernel compares integers.
The bytes of a block are one word of four, which is stored as it is where the first element begins a
block; elsewhere (``SKIP`` of its elements come before) they are stored byte by byte.

Floor: one or four bytes written an element, and a Philox block for four elements (see ``philox``).
The machine code for sm_90 has 17 instructions an element, comparison and store included. An H200
(132 multiprocessors that start 128 lanes a cycle, 1.8 GHz) should need 33 µs of them for
14336 × 4096 elements, 60 µs if wide products run at a quarter of that rate, and 15 µs to write the
bytes: an estimate, not a measurement.
"""

from __future__ import annotations

import bisect
import functools
import math
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.launch import Config, Example, launch
from pyeditfast_kernels.philox import SCALE, block_words, in_order, uniform

BYTES = Config(
    "4096 bytes",
    {"BLOCK": 4096},
    num_warps=8,
    num_stages=1,
    why="16 bytes a thread are one store",
)
NUMBERS = Config(
    "2048 numbers",
    {"BLOCK": 2048},
    num_warps=8,
    num_stages=1,
    why="two stores of 16 bytes a thread",
)


@triton.jit
def is_kept(word, last):
    """Say for each ``word``, uint32, whether ``min(word, 2^32 − 1 − word)`` is up to ``last``."""
    # As a signed number such a word is between −last − 1 and last.
    last = last.to(tl.uint32)
    return tl.add(word, last + 1, sanitize_overflow=False) <= last + last + 1


@triton.jit
def kept_bytes(seed, block, last):
    """Return for each ``block``, int64 or uint32, four bytes, int32: byte ``k`` is 1 where a mask
    keeps its ``k``-th element, else 0.

    ``last`` is int32 or None, and the launcher's ``last_kept(ratio)``.
    """
    if last is None:
        return (block * 0).to(tl.int32)
    else:
        first, second, third, fourth = block_words(seed, block)
        low = tl.where(is_kept(first, last), 1, 0) | tl.where(is_kept(second, last), 1 << 8, 0)
        high = tl.where(is_kept(third, last), 1 << 16, 0)
        high |= tl.where(is_kept(fourth, last), 1 << 24, 0)
        return low | high


@triton.jit
def bytes_in_order(words):
    """Return the bytes, int8, of ``words``, int32, ``[..., n]`` as ``[..., 4 n]``."""
    return in_order(
        words.to(tl.int8),
        (words >> 8).to(tl.int8),
        (words >> 16).to(tl.int8),
        (words >> 24).to(tl.int8),
    )


@triton.jit
def flat_blocks(offset, FAR: tl.constexpr, BLOCK: tl.constexpr):
    """Return the blocks of a program's ``BLOCK`` elements; uint32 unless ``FAR``."""
    first = (offset + tl.program_id(0).to(tl.int64) * BLOCK) >> 2
    block = first + tl.arange(0, BLOCK // 4)
    if FAR:
        return block
    else:
        return block.to(tl.uint32)


@triton.jit(do_not_specialize=["seed", "offset", "last"])
def random_mask_kernel(
    out,
    seed: tl.uint64,
    offset: tl.int64,
    last,
    numel,
    SKIP: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out`` has ``numel`` bytes, or as many words of four bytes where ``SKIP`` is 0."""
    kept = kept_bytes(seed, flat_blocks(offset, FAR, BLOCK), last)
    if SKIP == 0:
        place = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        tl.store(out + place, kept, mask=place < numel)
    else:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) - SKIP
        tl.store(out + place, bytes_in_order(kept), mask=(place >= 0) & (place < numel))


@triton.jit(do_not_specialize=["seed", "offset"])
def random_uniform_kernel(
    out,
    seed: tl.uint64,
    offset: tl.int64,
    numel,
    SKIP: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, second, third, fourth = block_words(seed, flat_blocks(offset, FAR, BLOCK))
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) - SKIP
    number = uniform(in_order(first, second, third, fourth))
    tl.store(out + place, number, mask=(place >= 0) & (place < numel))


@functools.lru_cache(maxsize=64)
def last_kept(ratio: float) -> int | None:
    """Return the largest folded word whose uniform number is below ``ratio``; None if none is.

    ``ratio`` is rounded to float32 first, as the reference does.
    """
    bound, scale = _to_float32(ratio), _to_float32(SCALE.value)
    words = range(1 << 31)
    # A product of two float32 numbers is exact in float64.
    kept = bisect.bisect_left(words, bound, key=lambda w: _to_float32(_to_float32(w) * scale))
    return kept - 1 if kept else None


def _to_float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def is_far(numel: int, offset: int = 0) -> bool:
    """Say whether indices of elements need more than 32 bits."""
    return offset + numel > 1 << 32


def padded(numel: int) -> int:
    """Return ``numel`` rounded up so that every store of whole blocks is one of 16 bytes."""
    # Triton tells sizes apart by whether 16 divides them, and a mask's is counted in words of four.
    return triton.cdiv(numel, 64) * 64


def random_mask(
    seed: int, ratio: float, shape: Sequence[int], device: torch.device | str, offset: int = 0
) -> Tensor:
    """Return a boolean tensor whose element ``i`` is ``u(seed, offset + i) < ratio``."""
    numel = math.prod(shape)
    skip = offset % 4
    out = torch.empty(padded(numel), dtype=torch.uint8, device=device)
    stored = out if skip else out.view(torch.int32)
    launch(
        random_mask_kernel,
        (triton.cdiv(skip + numel, BYTES.sizes["BLOCK"]) if numel else 0,),
        BYTES,
        out=stored,
        seed=seed,
        offset=offset,
        last=last_kept(ratio),
        numel=stored.numel(),
        SKIP=skip,
        FAR=is_far(numel, offset),
    )
    return out[:numel].view(torch.bool).view(tuple(shape))


def random_uniform(
    seed: int, shape: Sequence[int], offset: int, device: torch.device | str
) -> Tensor:
    """Return a float32 tensor whose element ``i`` is ``u(seed, offset + i)``."""
    numel = math.prod(shape)
    skip = offset % 4
    out = torch.empty(padded(numel), dtype=torch.float32, device=device)
    launch(
        random_uniform_kernel,
        (triton.cdiv(skip + numel, NUMBERS.sizes["BLOCK"]) if numel else 0,),
        NUMBERS,
        out=out,
        seed=seed,
        offset=offset,
        numel=out.numel(),
        SKIP=skip,
        FAR=is_far(numel, offset),
    )
    return out[:numel].view(tuple(shape))


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""

    def example(name: str, offset: int, *shape: int) -> Example:
        def call() -> None:
            random_mask(2**40, 0.2, shape, "meta", offset)
            random_uniform(2**40, shape, offset, "meta")

        return Example(f"{' × '.join(map(str, shape))}, {name}", call)

    return [
        example("from 0", 0, 4096, 14336),
        example("from 0", 0, 4095, 14335),
        example("beyond 32 bits", 2**40, 4096, 14336),
        example("from 3", 3, 4096, 14336),
        example("beyond 32 bits, from 3", 2**40 + 3, 4096, 14336),
    ]
