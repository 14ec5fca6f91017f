"""philox: the words of parts of a matrix against the reference's blocks, word by word."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast.reference.random_mask import philox_4x32_10
from pyeditfast_kernels import philox as kernels
from pyeditfast_kernels.launch import Config

SEED = 2**63 + 12345


def stream(first: int, count: int) -> Tensor:
    """Return words ``first`` to ``first + count`` of the stream of SEED, int64."""
    blocks = torch.arange(first // 4, (first + count) // 4 + 1)
    zero = torch.zeros_like(blocks)
    counter = (blocks & 0xFFFFFFFF, blocks >> 32, zero, zero)
    words = torch.stack(philox_4x32_10(counter, (SEED & 0xFFFFFFFF, SEED >> 32)), dim=1)
    return words.flatten()[first % 4 : first % 4 + count]


@triton.jit(do_not_specialize=["start", "first_row", "first_column", "d_in"])
def words_kernel(
    out,
    seed: tl.uint64,
    start: tl.int64,
    first_row,
    first_column,
    d_in,
    PHILOX_BLOCKS: tl.constexpr,
    FAR: tl.constexpr,
):
    row, column = tl.cast(first_row, tl.int64), tl.cast(first_column, tl.int64)
    words = kernels.words_of_part(seed, start, row, column, d_in, PHILOX_BLOCKS, FAR, 4, 32)
    place = tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + place, words.to(tl.int64))


CASES = [
    (0, 0, 0, 32, False),
    (8, 3, 4, 36, False),
    (0, 2**16 - 4, 2**16 - 32, 2**16, False),
    (0, 2**16 - 4, 2**16 - 32, 2**16, True),
    (2**34 - 64, 0, 0, 32, True),
    (2**40, 2**20, 8, 4092, True),
    (1, 0, 0, 32, False),
    (2**34 - 62, 1, 5, 33, True),
    (0, 5, 3, 31, False),
]
"""Elements before the matrix, first row and column of the part, d_in, and whether it is far."""


@pytest.mark.parametrize("philox_blocks", [0, 1, 2])
@pytest.mark.parametrize(("start", "first_row", "first_column", "d_in", "far"), CASES[:6])
def test_rows_that_begin_with_a_block(
    device, start, first_row, first_column, d_in, far, philox_blocks
):
    out = torch.full((4, 32), -1, dtype=torch.int64, device=device)
    words_kernel[(1,)](out, SEED, start, first_row, first_column, d_in, philox_blocks, far)
    for row in range(4):
        expected = stream(start + (first_row + row) * d_in + first_column, 32)
        assert torch.equal(out[row].cpu(), expected), row


@pytest.mark.parametrize(("start", "first_row", "first_column", "d_in", "far"), CASES[6:])
def test_rows_that_begin_inside_a_block(device, start, first_row, first_column, d_in, far):
    out = torch.full((4, 32), -1, dtype=torch.int64, device=device)
    words_kernel[(1,)](out, SEED, start, first_row, first_column, d_in, 0, far)
    for row in range(4):
        expected = stream(start + (first_row + row) * d_in + first_column, 32)
        assert torch.equal(out[row].cpu(), expected), row


@pytest.mark.parametrize(
    ("d_in", "start", "dtype", "part", "expected"),
    [
        (4096, 0, torch.bfloat16, 2048, 2),
        (4096, 4, torch.float16, 4096, 2),
        (4096, 0, torch.float32, 4096, 1),
        # Four elements a thread, and two.
        (4096, 0, torch.bfloat16, 1024, 1),
        (4096, 0, torch.bfloat16, 512, 1),
        (4095, 0, torch.bfloat16, 2048, 0),
        (4098, 0, torch.float32, 2048, 0),
        (4096, 2, torch.bfloat16, 2048, 0),
    ],
)
def test_whole_blocks_where_rows_begin_with_one(d_in, start, dtype, part, expected):
    config = Config("eight warps", {}, num_warps=8, num_stages=1, why="as the kernels have")
    assert kernels.blocks_side_by_side(d_in, start, dtype, part, config) == expected
