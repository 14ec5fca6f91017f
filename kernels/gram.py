"""Gram matrix of keys, ``G = K Kᵀ + ridge · I``, one triangle computed and mirrored.

``keys`` ``[modules, n, d]`` in bf16, fp16 or float32, of any strides; ``G`` ``[modules, n, n]``
float32, contiguous, symmetric bit for bit.

Floor for one module: ``n² d`` FLOPs on the 16-bit tensor cores (six times that for float32 keys,
whose parts are multiplied, see ``tile_product``), ``n d`` elements read and ``4 n²`` bytes written.

A small ``n`` gives too few tiles to fill a GPU, so the sum over ``d`` is cut into ``splits``; a
second kernel adds their partial tiles in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.launch import Config, Example, interprets, launch
from pyeditfast_kernels.modules import aligned
from pyeditfast_kernels.symmetric_tile import mirror_diagonal, store_symmetric
from pyeditfast_kernels.tile_order import triangle_programs, triangle_tile, triangle_tiles
from pyeditfast_kernels.tile_product import tile_product
from pyeditfast_kernels.tuned import Tunable, describe_dtype, tuned_config

SMALL = Config(
    "64 × 64",
    {"BLOCK_N": 64, "BLOCK_K": 64},
    num_warps=4,
    num_stages=4,
    why="up to 512 rows: less of a tile lies beyond n, and four programs share a multiprocessor",
)
LARGE = Config(
    "128 × 128",
    {"BLOCK_N": 128, "BLOCK_K": 64},
    num_warps=8,
    num_stages=3,
    why="half the L2 reads of 64 × 64; two accumulators of this size are all that fits registers",
)
FINE = Config(
    "64 × 64, 32 deep",
    {"BLOCK_N": 64, "BLOCK_K": 32},
    num_warps=4,
    num_stages=3,
    why="float32, whose parts fill the registers, and rows that are not aligned to 16 bytes",
)
DEEP = Config(
    "64 × 64, 128 deep",
    {"BLOCK_N": 64, "BLOCK_K": 128},
    num_warps=4,
    num_stages=3,
    why="for `make tune`: half the steps of 64 × 64, two programs a multiprocessor",
)
SHALLOW = Config(
    "128 × 128, 32 deep",
    {"BLOCK_N": 128, "BLOCK_K": 32},
    num_warps=8,
    num_stages=4,
    why="for `make tune`: three blocks' loads are under way instead of two",
)
FINE_WIDE = Config(
    "64 × 64, 32 deep, 8 warps",
    {"BLOCK_N": 64, "BLOCK_K": 32},
    num_warps=8,
    num_stages=4,
    why="for `make tune`: twice the warps hide more of the splitting of float32",
)
REDUCE = Config(
    "strips of 16 rows",
    {"BLOCK_ROWS": 16},
    num_warps=4,
    num_stages=1,
    why="a few tiles give programs for the whole chip",
)

SMALL_UP_TO = 512

PROGRAMS_AT_ONCE = {64: 528, 128: 132}
"""By rows of a tile: what an H200's 132 multiprocessors hold, by registers. An estimate that only
costs speed where it is wrong, and the same on every GPU, so that all give the same bits.
"""

START_COST = 128
"""Starting a tile costs as much as this many columns of keys; an estimate."""

FEWEST_COLUMNS = 512
MOST_SPLITS = 32


CANDIDATES = {
    "bfloat16, few rows": (SMALL, DEEP, LARGE),
    "bfloat16, many rows": (LARGE, SHALLOW, SMALL),
    "float32, few rows": (FINE, FINE_WIDE),
    "float32, many rows": (FINE, FINE_WIDE),
}
"""By class of shapes, what ``make tune`` chooses from; the first is the default."""


def choose_config(
    n: int, dtype: torch.dtype, is_aligned: bool, device: torch.device | None = None
) -> Config:
    """Return the configuration for ``n`` rows: that tuned for ``device``, if any."""
    if not is_aligned:
        return FINE
    few = n <= SMALL_UP_TO
    shape_class = f"{describe_dtype(dtype)}, {'few' if few else 'many'} rows"
    tuned = tuned_config("gram", shape_class, CANDIDATES, device)
    if tuned or dtype == torch.float32:
        return tuned or FINE
    return SMALL if few else LARGE


def choose_splits(tiles: int, d: int, block: int) -> int:
    """Return into how many parts ``d`` is cut for ``tiles`` tiles of ``block × block``.

    Minimizes the columns that programs work through one after the other, where writing and reading
    a partial tile of 64 × 64 counts as one column.
    """

    def cost(splits: int) -> float:
        rounds = -(-tiles * splits // PROGRAMS_AT_ONCE[block])
        moved = tiles * splits * (block // 64) ** 2 if splits > 1 else 0
        return rounds * (d / splits + START_COST) + moved

    return min(range(1, max(1, min(MOST_SPLITS, d // FEWEST_COLUMNS)) + 1), key=cost)


@triton.jit(do_not_specialize=["splits", "tiles", "programs"])
def gram_kernel(
    keys,
    gram,
    partial,
    ridge,
    n,
    d,
    chunk,
    splits,
    tiles,
    programs,
    keys_stride_module,
    keys_stride_n,
    keys_stride_d,
    INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    index = tl.program_id(0)
    tile_row, tile_column = triangle_tile(index % programs, tiles)
    if tile_row < 0:
        return
    split = index // programs % splits
    module = (index // programs // splits).to(tl.int64)
    lanes = tl.arange(0, BLOCK_N)
    rows = tile_row.to(tl.int64) * BLOCK_N + lanes  # [BLOCK_N]
    columns = tile_column.to(tl.int64) * BLOCK_N + lanes  # [BLOCK_N]
    keys += module * keys_stride_module
    tile = tile_product(
        keys,
        keys,
        rows,
        columns,
        n,
        n,
        split * chunk,
        tl.minimum(split * chunk + chunk, d),
        keys_stride_n,
        keys_stride_d,
        keys_stride_d,
        keys_stride_n,
        BLOCK_N,
        BLOCK_N,
        BLOCK_K,
        True,
        INTERPRETED,
    )  # [BLOCK_N, BLOCK_N]
    if tile_row == tile_column:
        tile = mirror_diagonal(tile, BLOCK_N)
    if partial is None:
        tile += tl.where(rows[:, None] == columns[None, :], ridge, 0.0)
        gram += module * n * n
        store_symmetric(gram, tile, tile_row, tile_column, n, n, 1, False, BLOCK_N)
    else:
        partial += index.to(tl.int64) * (BLOCK_N * BLOCK_N)
        tl.store(partial + lanes[:, None] * BLOCK_N + lanes[None, :], tile)


@triton.jit(do_not_specialize=["splits", "tiles", "programs"])
def gram_reduce_kernel(
    partial,
    gram,
    ridge,
    n,
    splits,
    tiles,
    programs,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Add the partial tiles ``[modules, splits, programs, BLOCK_N, BLOCK_N]`` of all splits."""
    STRIPS: tl.constexpr = BLOCK_N // BLOCK_ROWS
    index = tl.program_id(0) // STRIPS
    strip = tl.program_id(0) % STRIPS
    tile_row, tile_column = triangle_tile(index % programs, tiles)
    if tile_row < 0:
        return
    module = (index // programs).to(tl.int64)
    rows = strip * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32)
    for split in range(0, splits):
        place = (module * splits + split) * programs + index % programs
        total += tl.load(partial + place * (BLOCK_N * BLOCK_N) + rows * BLOCK_N + columns)
    first_row = tile_row.to(tl.int64) * BLOCK_N
    first_column = tile_column.to(tl.int64) * BLOCK_N
    total += tl.where(first_row + rows == first_column + columns, ridge, 0.0)
    inside = (first_row + rows < n) & (first_column + columns < n)
    gram += module * n * n
    tl.store(gram + first_row * n + first_column + (rows * n + columns), total, mask=inside)
    if tile_row != tile_column:
        tl.store(gram + first_column * n + first_row + (columns * n + rows), total, mask=inside)


def gram(
    keys: Tensor, ridge: float, config: Config | None = None, splits: int | None = None
) -> Tensor:
    """Return ``K Kᵀ + ridge · I``, ``[modules, n, n]``, for ``keys`` ``[modules, n, d]``.

    ``config`` and ``splits`` are those of ``choose_config`` and ``choose_splits`` unless given.
    """
    modules, n, d = keys.shape
    out = torch.empty((modules, n, n), dtype=torch.float32, device=keys.device)
    config = config or choose_config(n, keys.dtype, aligned(keys), keys.device)
    block, depth = config.sizes["BLOCK_N"], config.sizes["BLOCK_K"]
    tiles = triton.cdiv(n, block)
    programs = triangle_programs(tiles)
    if splits is None:
        splits = choose_splits(modules * triangle_tiles(tiles), d, block)
    chunk = max(1, triton.cdiv(triton.cdiv(d, splits), depth)) * depth
    splits = max(1, triton.cdiv(d, chunk))
    partial = None
    if splits > 1:
        size = modules * splits * programs * block * block
        partial = torch.empty(size, dtype=torch.float32, device=keys.device)
    launch(
        gram_kernel,
        (modules * splits * programs,),
        config,
        keys=keys,
        gram=out,
        partial=partial,
        ridge=ridge,
        n=n,
        d=d,
        chunk=chunk,
        splits=splits,
        tiles=tiles,
        programs=programs,
        keys_stride_module=keys.stride(0),
        keys_stride_n=keys.stride(1),
        keys_stride_d=keys.stride(2),
        INTERPRETED=interprets(),
    )
    if partial is not None:
        launch(
            gram_reduce_kernel,
            (modules * programs * (block // REDUCE.sizes["BLOCK_ROWS"]),),
            REDUCE,
            partial=partial,
            gram=out,
            ridge=ridge,
            n=n,
            splits=splits,
            tiles=tiles,
            programs=programs,
            BLOCK_N=block,
        )
    return out


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""

    def example(modules: int, n: int, d: int, name: str) -> Example:
        def call() -> None:
            gram(torch.empty(modules, n, d, dtype=dtypes[name], device="meta"), 1.0)

        kernels = (gram_kernel.__name__,)
        wide = (*kernels, gram_reduce_kernel.__name__) if d % 16 == 0 else ()
        return Example(f"{name}, {modules} of {n} × {d}", call, kernels, wide)

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    shapes = [
        (1, 100, 512),
        (2, 397, 14336),
        (1, 2001, 14336),
        (1, 4096, 14336),
        (2, 397, 14335),
        (1, 100, 500),
    ]
    return [
        example(*shape, name)
        for shape in shapes
        for name in dtypes
        if name != "fp16" or shape[1] in (397, 4096)
    ]


def tunable() -> list[Tunable]:
    """Return what ``make tune`` chooses between."""

    def choice(shape_class: str, n: int, dtype: torch.dtype) -> Tunable:
        def inputs(device: torch.device, tiny: bool) -> tuple[Tensor, ...]:
            shape = (1, 80, 144) if tiny else (2, n, 14336)
            return (torch.randn(shape, device=device).to(dtype),)

        return Tunable(
            "gram",
            shape_class,
            CANDIDATES[shape_class],
            inputs,
            call=lambda inputs, config: gram(inputs[0], 1.0, config),
            exact=lambda inputs: (
                inputs[0].double() @ inputs[0].double().mT
                + torch.eye(inputs[0].shape[1], dtype=torch.float64, device=inputs[0].device)
            ),
        )

    return [
        choice(f"{describe_dtype(dtype)}, {rows} rows", n, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for rows, n in (("few", 397), ("many", 2001))
    ]
