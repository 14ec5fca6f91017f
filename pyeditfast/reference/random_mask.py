"""Uniform numbers and masks that are functions of a seed and an element's index (Philox4x32-10).

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). The key
is the seed and the counter a block's number; the four words of a block are for four consecutive
elements, so that a number costs a quarter of a block. No state is kept and no order is implied, so
any part of a mask can be computed anywhere, and every backend gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER_A = 0xD2511F53
_MULTIPLIER_B = 0xCD9E8D57
_KEY_STEP_A = 0x9E3779B9
_KEY_STEP_B = 0xBB67AE85
_ROUNDS = 10

# The float32 nearest to 4.6566127342e-10, the largest below 2^-31: (2^31 - 1) times it, rounded to
# float32, is still below 1.
_SCALE = 4.6566127342e-10

# Each 64-bit intermediate of a chunk's blocks takes 2 MB, and of its elements 8 MB.
_CHUNK = 1 << 20


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of ``multiplier · word``, both factors below 2^32.

    The product of two 32-bit words does not fit in a signed 64-bit integer, so the word is
    multiplied in halves of 16 bits.
    """
    low = multiplier * (word & 0xFFFF)
    middle = multiplier * (word >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four output words of Philox4x32-10 for every counter.

    All tensors are int64 of one shape and hold words in ``[0, 2^32)``; so does ``key``. A round is
    ``(c0, c1, c2, c3) → (hi(B·c2) ⊕ c1 ⊕ k0, lo(B·c2), hi(A·c0) ⊕ c3 ⊕ k1, lo(A·c0))``, after
    which the key grows by a constant (Salmon et al. 2011, section 3.3).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(_MULTIPLIER_A, c0)
        high_b, low_b = _multiply(_MULTIPLIER_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 = (k0 + _KEY_STEP_A) & _WORD
        k1 = (k1 + _KEY_STEP_B) & _WORD
    return c0, c1, c2, c3


def random_uniform(
    seed: int,
    shape: Sequence[int],
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return float32 numbers in ``[0, 1)``: element ``i`` (row-major) is ``u(seed, offset + i)``.

    ``u(seed, j)`` is made of ``w``, word ``j mod 4`` of the Philox block ``b = j div 4``, which has
    the counter ``(b mod 2^32, b div 2^32, 0, 0)`` and the key ``(seed mod 2^32, seed div 2^32)``:
    ``w`` is folded to ``f = min(w, 2^32 − 1 − w)``, and ``f`` rounded to float32 and scaled by the
    float32 just below 2^-31. Raises what ``check_arguments`` raises.
    """
    shape = check_arguments(seed, shape, offset)
    out = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    for begin, numbers in _chunks(seed, out.numel(), offset, out.device):
        out[begin : begin + numbers.numel()] = numbers
    return out.reshape(shape)


def random_mask(
    seed: int,
    ratio: float,
    shape: Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Return a boolean mask: element ``i`` (row-major) is ``u(seed, i) < ratio``.

    ``u`` is that of ``random_uniform``, and ``ratio`` is rounded to float32 first. About
    ``ratio`` of the elements are True; 0 gives none and 1 gives all. Raises what
    ``check_arguments`` raises.
    """
    shape = check_arguments(seed, shape, ratio=ratio)
    out = torch.empty(math.prod(shape), dtype=torch.bool, device=device)
    bound = torch.tensor(ratio, dtype=torch.float32, device=out.device)
    for begin, numbers in _chunks(seed, out.numel(), 0, out.device):
        out[begin : begin + numbers.numel()] = numbers < bound
    return out.reshape(shape)


def check_arguments(
    seed: int, shape: Sequence[int], offset: int = 0, ratio: float = 0.0
) -> tuple[int, ...]:
    """Return ``shape`` as a tuple of integers if all arguments are fit for a random stream.

    Raises ``TypeError`` for a seed, offset or size that is not an integer and for a ratio that is
    not a number. Raises ``ValueError`` for a seed outside ``[0, 2^64)``, a negative size, a ratio
    outside ``[0, 1]``, or an offset that is negative or whose last element would lie beyond
    ``2^63 − 1``.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence of integers, got {shape!r}")
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"shape must hold integers, got {tuple(shape)!r}")
        if size < 0:
            raise ValueError(f"shape must not hold a negative size, got {tuple(shape)!r}")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a number, got {ratio!r}")
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be in [0, 1], got {ratio!r}")
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset must be an integer, got {offset!r}")
    if offset < 0 or offset + math.prod(shape) >= 1 << 63:
        raise ValueError(
            f"offset must be >= 0 and offset + elements below 2**63, got offset {offset} for "
            f"shape {tuple(shape)!r}"
        )
    return tuple(shape)


def _chunks(
    seed: int, numel: int, offset: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(begin, u(seed, offset + begin), …)`` for consecutive chunks of ``[0, numel)``."""
    key = (seed & _WORD, seed >> 32)
    for begin in range(0, numel, _CHUNK):
        count = min(_CHUNK, numel - begin)
        first, skipped = divmod(offset + begin, 4)
        blocks = (skipped + count + 3) // 4
        block = torch.arange(blocks, dtype=torch.int64, device=device) + first
        zero = torch.zeros_like(block)
        words = philox_4x32_10((block & _WORD, block >> 32, zero, zero), key)
        word = torch.stack(words, dim=1).flatten()[skipped : skipped + count]
        folded = torch.minimum(word, _WORD - word)
        yield begin, folded.to(torch.float32) * _SCALE
