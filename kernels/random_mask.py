"""Philox masks and uniform numbers, functions of a seed and an element's index.

``mask[i] = u(seed, offset + i) < ratio`` as bytes, and ``u`` itself as float32, for elements ``i``
of any shape, row-major; the equations are those of ``pyeditfast.reference.random_mask``, bit by
bit. Other kernels compute their part of a mask with ``keeps``, so that none is stored.

A mask needs no floating-point numbers: ``u`` grows with the folded word ``min(w, 2^32 − 1 − w)``,
so the launcher finds the last one whose ``u`` is below the ratio, and the kernel compares integers.

Floor: one or four bytes written an element, and ten Philox rounds. For the first output word, of
counters whose second half is zero, they are 17 products of 32 × 32 bits and 17 xors (29 products
where their halves are computed one by one, as ``tl.rand`` does); with comparison and store the
machine code has about 44 instructions an element. An H200 (132 multiprocessors that start 128 lanes
a cycle, 1.8 GHz) should need 85 µs of them for 14336 × 4096 elements, 130 µs if wide products run
at a quarter of that rate, and 15 µs to write the bytes: an estimate, not a measurement.
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

MULTIPLIER_A = tl.constexpr(0xD2511F53)
MULTIPLIER_B = tl.constexpr(0xCD9E8D57)
KEY_STEP_A = tl.constexpr(0x9E3779B9)
KEY_STEP_B = tl.constexpr(0xBB67AE85)
ROUNDS = tl.constexpr(10)

SCALE = tl.constexpr(4.6566127342e-10)
"""The largest float32 below 2⁻³¹, see the reference."""


@triton.jit
def first_word(seed, index):
    """Return the first word, uint32, of Philox4x32-10 for the counter ``index``, int64 or uint32.

    An index known to be below 2³² is cheaper as uint32.
    """
    c0 = index.to(tl.uint32)
    c2 = c0 * 0
    c3 = c2
    c1 = (index >> 32).to(tl.uint32) if index.dtype.primitive_bitwidth == 64 else c2
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
    return c0


@triton.jit
def is_kept(word, last):
    """Say for each ``word``, uint32, whether ``min(word, 2^32 − 1 − word)`` is up to ``last``."""
    # As a signed number such a word is between −last − 1 and last.
    last = last.to(tl.uint32)
    return tl.add(word, last + 1, sanitize_overflow=False) <= last + last + 1


@triton.jit
def keeps(seed, index, last):
    """Say for each ``index``, int64 or uint32, whether a mask is True there.

    ``last`` is int32 or None, and the launcher's ``last_kept(ratio)``.
    """
    if last is None:
        return index != index
    else:
        return is_kept(first_word(seed, index), last)


@triton.jit
def flat_index(offset, place, FAR: tl.constexpr):
    """Return the index of the random number of element ``place``; uint32 unless ``FAR``."""
    index = offset + place
    if FAR:
        return index
    else:
        return index.to(tl.uint32)


@triton.jit(do_not_specialize=["seed", "offset", "last"])
def random_mask_kernel(
    out,
    seed: tl.uint64,
    offset: tl.int64,
    last,
    numel,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = keeps(seed, flat_index(offset, place, FAR), last)
    tl.store(out + place, kept.to(tl.uint8), mask=place < numel)


@triton.jit(do_not_specialize=["seed", "offset"])
def random_uniform_kernel(
    out, seed: tl.uint64, offset: tl.int64, numel, FAR: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = first_word(seed, flat_index(offset, place, FAR)).to(tl.int32, bitcast=True)
    folded = word ^ (word >> 31)
    tl.store(out + place, folded.to(tl.float32) * SCALE, mask=place < numel)


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
    """Return ``numel`` rounded up so that every store of the kernels is one of 16 bytes."""
    return triton.cdiv(numel, 16) * 16


def random_mask(
    seed: int, ratio: float, shape: Sequence[int], device: torch.device | str, offset: int = 0
) -> Tensor:
    """Return a boolean tensor whose element ``i`` is ``u(seed, offset + i) < ratio``."""
    numel = math.prod(shape)
    out = torch.empty(padded(numel), dtype=torch.uint8, device=device)
    launch(
        random_mask_kernel,
        (triton.cdiv(numel, BYTES.sizes["BLOCK"]),),
        BYTES,
        out=out,
        seed=seed,
        offset=offset,
        last=last_kept(ratio),
        numel=out.numel(),
        FAR=is_far(numel, offset),
    )
    return out[:numel].view(torch.bool).view(tuple(shape))


def random_uniform(
    seed: int, shape: Sequence[int], offset: int, device: torch.device | str
) -> Tensor:
    """Return a float32 tensor whose element ``i`` is ``u(seed, offset + i)``."""
    numel = math.prod(shape)
    out = torch.empty(padded(numel), dtype=torch.float32, device=device)
    launch(
        random_uniform_kernel,
        (triton.cdiv(numel, NUMBERS.sizes["BLOCK"]),),
        NUMBERS,
        out=out,
        seed=seed,
        offset=offset,
        numel=out.numel(),
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
    ]
