"""What the matrix kernels share: parts of float32, orders of tiles, views of modules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from ops.layouts import random_rows, same_bits

from pyeditfast_kernels.launch import interprets
from pyeditfast_kernels.modules import aligned, as_modules
from pyeditfast_kernels.tile_order import (
    grouped_tile,
    triangle_programs,
    triangle_tile,
    triangle_tiles,
)
from pyeditfast_kernels.tile_product import quarters, split, to_bfloat16, widened

# Parts of float32.


@triton.jit
def parts_kernel(numbers, parts, INTERPRETED: tl.constexpr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    high, middle, low = split(tl.load(numbers + lanes), INTERPRETED)
    tl.store(parts + lanes, high.to(tl.float32))
    tl.store(parts + SIZE + lanes, middle.to(tl.float32))
    tl.store(parts + 2 * SIZE + lanes, low.to(tl.float32))


@triton.jit
def round_kernel(numbers, rounded, INTERPRETED: tl.constexpr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    result = to_bfloat16(tl.load(numbers + lanes), INTERPRETED)
    tl.store(rounded + lanes, result.to(tl.float32))


@triton.jit
def widen_kernel(numbers, wide, INTERPRETED: tl.constexpr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(wide + lanes, widened(tl.load(numbers + lanes), INTERPRETED).to(tl.float32))


def float32_numbers(device: torch.device) -> torch.Tensor:
    """Return 4096 numbers of every magnitude, half way between two bfloat16, and at the limits."""
    numbers = random_rows(4096) * torch.logspace(-30, 30, 4096)
    ties = random_rows(1024, seed=1).bfloat16().float() * (1 + 2.0**-8)
    limits = torch.tensor([0.0, -0.0, 1.0, 3.4028235e38, -3.4028235e38, 3.3961775e38, 3.39e38])
    numbers[: ties.numel()] = ties
    numbers[-limits.numel() :] = limits
    return numbers.to(device)


def test_three_parts_are_the_number(device):
    numbers = float32_numbers(device)
    parts = torch.full((3, 4096), math.nan, device=device)
    parts_kernel[(1,)](numbers, parts, interprets(), 4096)
    assert torch.equal(parts, parts.bfloat16().float())
    assert torch.equal(parts.double().sum(0), numbers.double())
    # Each part leaves at most half a spacing, which is then rounded itself.
    _, middle, low = parts.double().abs()
    half = 2.0**-8 + 2.0**-16
    assert bool((middle <= half * numbers.abs()).all() and (low <= half * middle).all())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_parts_of_what_is_not_finite(device, number):
    parts = torch.zeros(3, 16, device=device)
    parts_kernel[(1,)](torch.full((16,), number, device=device), parts, interprets(), 16)
    assert not parts.sum(0).isfinite().any()


def test_rounds_to_the_nearest_bfloat16(device):
    numbers = float32_numbers(device)
    numbers[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    # A NaN whose bits would overflow.
    numbers[3:4].view(torch.int32).fill_(0x7FFFFFFF)
    rounded = torch.zeros(4096, device=device)
    round_kernel[(1,)](numbers, rounded, interprets(), 4096)
    expected = numbers.bfloat16().float()
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.equal(rounded.nan_to_num(0.0, 1e39, -1e39), expected.nan_to_num(0.0, 1e39, -1e39))


def test_every_bfloat16_is_read_as_it_is(device):
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = codes.view(torch.bfloat16).to(device)
    wide = torch.zeros(2**16, device=device)
    widen_kernel[(1,)](numbers, wide, interprets(), 2**16)
    assert torch.equal(wide.isnan(), numbers.isnan())
    assert torch.equal(wide[~wide.isnan()], numbers.float()[~numbers.isnan()])


# Parts of a tile.


@triton.jit
def quarters_kernel(tile, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    parts = quarters(tl.load(tile + rows * COLUMNS + columns), ROWS, COLUMNS)
    place = rows * COLUMNS + tl.arange(0, COLUMNS // 4)[None, :]
    for quarter in tl.static_range(4):
        tl.store(out + place + quarter * (COLUMNS // 4), parts[quarter])


@pytest.mark.parametrize(("rows", "columns"), [(8, 4), (16, 32)])
def test_quarters_stand_from_left_to_right(device, rows, columns):
    tile = random_rows(rows, columns).to(device)
    out = torch.full_like(tile, math.nan)
    quarters_kernel[(1,)](tile, out, rows, columns)
    assert same_bits(out, tile)


# Orders of tiles.


@triton.jit
def grouped_kernel(places, row_tiles, column_tiles):
    index = tl.program_id(0)
    row, column = grouped_tile(index, row_tiles, column_tiles)
    tl.store(places + 2 * index, row)
    tl.store(places + 2 * index + 1, column)


@triton.jit
def triangle_kernel(places, tiles):
    index = tl.program_id(0)
    row, column = triangle_tile(index, tiles)
    tl.store(places + 2 * index, row)
    tl.store(places + 2 * index + 1, column)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (9, 1), (8, 3), (19, 5)])
def test_every_tile_has_one_program(device, rows, columns):
    places = torch.full((rows * columns, 2), -7, dtype=torch.int32, device=device)
    grouped_kernel[(rows * columns,)](places, rows, columns)
    found = [tuple(place) for place in places.tolist()]
    assert sorted(found) == list(itertools.product(range(rows), range(columns)))


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 8, 15, 16, 17, 18, 19, 33])
def test_every_tile_of_the_triangle_has_one_program(device, tiles):
    places = torch.full((triangle_programs(tiles), 2), -7, dtype=torch.int32, device=device)
    triangle_kernel[(len(places),)](places, tiles)
    found = sorted(tuple(place) for place in places.tolist() if place[0] != -1)
    assert found == [(row, column) for row in range(tiles) for column in range(row + 1)]
    assert len(found) == triangle_tiles(tiles)


@pytest.mark.parametrize(("kernel", "sizes"), [("grouped", (40, 60)), ("triangle", (60,))])
def test_neighbouring_programs_share_rows_and_columns(device, kernel, sizes):
    count = math.prod(sizes) if kernel == "grouped" else triangle_programs(*sizes)
    places = torch.zeros(count, 2, dtype=torch.int32, device=device)
    (grouped_kernel if kernel == "grouped" else triangle_kernel)[(count,)](places, *sizes)
    at_once = 132
    strips = [
        sum(len(part.unique()) for part in places[start : start + at_once].T)
        for start in range(0, count - at_once, at_once)
    ]
    # A row by row order needs 61 and more; a square patch would need 23.
    assert sorted(strips)[len(strips) // 2] <= 36


# Views of modules.


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_leading_dimensions_become_one(lead):
    tensors = torch.zeros(*lead, 5, 7), torch.zeros(*lead, 2, 3)
    ((first, views),) = as_modules(*tensors)
    assert first == 0
    for view, tensor in zip(views, tensors, strict=True):
        assert view.shape == (math.prod(lead), *tensor.shape[-2:])
        assert view.data_ptr() == tensor.data_ptr()


def test_leading_dimensions_that_cannot_be_joined():
    plain = torch.arange(2 * 3 * 4 * 5 * 7.0).view(2, 3, 4, 5, 7)
    swapped = plain.transpose(1, 2).contiguous().transpose(1, 2)
    seen = torch.zeros(24, 5, 7)
    for first, (view, other) in as_modules(swapped, plain):
        assert view.untyped_storage().data_ptr() == swapped.untyped_storage().data_ptr()
        assert torch.equal(view, other)
        seen[first : first + len(view)] = view
    assert torch.equal(seen, plain.view(24, 5, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_alignment(dtype):
    rows = torch.zeros(2, 32, 48, dtype=dtype)
    assert aligned(rows) and aligned(rows.mT) and aligned(rows[:, :5]) and aligned(rows[0])
    assert aligned(rows[:, :, 16:32])
    assert not aligned(rows[:, :, :40])
    assert not aligned(rows[:, :, ::2])
    assert not aligned(rows[:, :, 1:33])
    assert not aligned(rows, rows[:, :, 1:33])
    assert not aligned(torch.zeros(2, 32, 40, dtype=dtype))
    assert not aligned(torch.zeros(2 * 33 * 48, dtype=dtype).as_strided((2, 32, 48), (33, 48, 1)))
