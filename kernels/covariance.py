"""Uncentred covariance of keys, ``C ← C + Kᵀ K``, one triangle computed and mirrored.

``keys`` ``[modules, n, d]`` in bf16, fp16 or float32, of any strides; ``C`` ``[modules, d, d]``
float32, of any strides, symmetric: its lower triangle is read, both are written, so it stays
symmetric bit for bit.

Floor for one module: ``n d²`` FLOPs on the 16-bit tensor cores (six times that for float32 keys,
whose parts are multiplied, see ``tile_product``), ``n d`` elements read, ``2 d²`` bytes of
``C`` read and ``4 d²`` written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.launch import Config, Example, interprets, launch
from pyeditfast_kernels.modules import aligned
from pyeditfast_kernels.symmetric_tile import mirror_diagonal, store_symmetric
from pyeditfast_kernels.tile_order import triangle_programs, triangle_tile
from pyeditfast_kernels.tile_product import tile_product
from pyeditfast_kernels.tuned import Tunable, describe_dtype, tuned_config

SMALL = Config(
    "64 × 64",
    {"BLOCK_D": 64, "BLOCK_K": 64},
    num_warps=4,
    num_stages=4,
    why="up to 1024 features: 128 × 128 would give 36 programs at most",
)
LARGE = Config(
    "128 × 128",
    {"BLOCK_D": 128, "BLOCK_K": 64},
    num_warps=8,
    num_stages=3,
    why="half the L2 reads of 64 × 64; two accumulators of this size are all that fits registers",
)
FINE = Config(
    "64 × 64, 32 deep",
    {"BLOCK_D": 64, "BLOCK_K": 32},
    num_warps=4,
    num_stages=3,
    why="float32, whose parts fill the registers, and rows that are not aligned to 16 bytes",
)

DEEP = Config(
    "64 × 64, 128 deep",
    {"BLOCK_D": 64, "BLOCK_K": 128},
    num_warps=4,
    num_stages=3,
    why="for `make tune`: half the steps of 64 × 64, two programs a multiprocessor",
)
SHALLOW = Config(
    "128 × 128, 32 deep",
    {"BLOCK_D": 128, "BLOCK_K": 32},
    num_warps=8,
    num_stages=4,
    why="for `make tune`: three blocks' loads are under way instead of two",
)
FINE_WIDE = Config(
    "64 × 64, 32 deep, 8 warps",
    {"BLOCK_D": 64, "BLOCK_K": 32},
    num_warps=8,
    num_stages=4,
    why="for `make tune`: twice the warps hide more of the splitting of float32",
)

SMALL_UP_TO = 1024

CANDIDATES = {
    "bfloat16, few features": (SMALL, DEEP),
    "bfloat16, many features": (LARGE, SHALLOW, SMALL),
    "float32, many features": (FINE, FINE_WIDE),
}
"""By class of shapes, what ``make tune`` chooses from; the first is the default."""


def choose_config(
    d: int, dtype: torch.dtype, is_aligned: bool, device: torch.device | None = None
) -> Config:
    """Return the configuration for ``d`` features: that tuned for ``device``, if any."""
    if not is_aligned:
        return FINE
    few = d <= SMALL_UP_TO
    shape_class = f"{describe_dtype(dtype)}, {'few' if few else 'many'} features"
    tuned = tuned_config("covariance", shape_class, CANDIDATES, device)
    if tuned or dtype == torch.float32:
        return tuned or FINE
    return SMALL if few else LARGE


@triton.jit(do_not_specialize=["n", "tiles", "programs"])
def covariance_kernel(
    keys,
    out,
    n,
    d,
    tiles,
    programs,
    keys_stride_module,
    keys_stride_n,
    keys_stride_d,
    out_stride_module,
    out_stride_row,
    out_stride_column,
    INTERPRETED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_row, tile_column = triangle_tile(tl.program_id(0) % programs, tiles)
    if tile_row < 0:
        return
    module = (tl.program_id(0) // programs).to(tl.int64)
    first_row = tile_row.to(tl.int64) * BLOCK_D
    first_column = tile_column.to(tl.int64) * BLOCK_D
    lanes = tl.arange(0, BLOCK_D)
    keys += module * keys_stride_module
    tile = tile_product(
        keys,
        keys,
        first_row + lanes,
        first_column + lanes,
        d,
        d,
        0,
        n,
        keys_stride_d,
        keys_stride_n,
        keys_stride_n,
        keys_stride_d,
        BLOCK_D,
        BLOCK_D,
        BLOCK_K,
        True,
        INTERPRETED,
    )  # [BLOCK_D, BLOCK_D]
    if tile_row == tile_column:
        tile = mirror_diagonal(tile, BLOCK_D)
    store_symmetric(
        out + module * out_stride_module,
        tile,
        tile_row,
        tile_column,
        d,
        out_stride_row,
        out_stride_column,
        True,
        BLOCK_D,
    )


def covariance(keys: Tensor, out: Tensor, config: Config | None = None) -> Tensor:
    """Add ``Kᵀ K`` to ``out`` ``[modules, d, d]`` for ``keys`` ``[modules, n, d]``; return ``out``.

    ``config`` is that of ``choose_config`` unless given.
    """
    modules, n, d = keys.shape
    config = config or choose_config(d, keys.dtype, aligned(keys, out), keys.device)
    tiles = triton.cdiv(d, config.sizes["BLOCK_D"])
    programs = triangle_programs(tiles)
    launch(
        covariance_kernel,
        (modules * programs if n else 0,),
        config,
        keys=keys,
        out=out,
        n=n,
        d=d,
        tiles=tiles,
        programs=programs,
        keys_stride_module=keys.stride(0),
        keys_stride_n=keys.stride(1),
        keys_stride_d=keys.stride(2),
        out_stride_module=out.stride(0),
        out_stride_row=out.stride(1),
        out_stride_column=out.stride(2),
        INTERPRETED=interprets(),
    )
    return out


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""

    def example(modules: int, n: int, d: int, name: str) -> Example:
        def call() -> None:
            keys = torch.empty(modules, n, d, dtype=dtypes[name], device="meta")
            covariance(keys, torch.empty(modules, d, d, device="meta"))

        kernels = (covariance_kernel.__name__,)
        return Example(
            f"{name}, {modules} of {n} × {d}", call, kernels, kernels if d % 16 == 0 else ()
        )

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    shapes = [(1, 4001, 1024), (2, 4001, 4096), (2, 4001, 4095)]
    return [example(*shape, name) for shape in shapes for name in dtypes]


def tunable() -> list[Tunable]:
    """Return what ``make tune`` chooses between."""

    def choice(shape_class: str, d: int, dtype: torch.dtype) -> Tunable:
        def inputs(device: torch.device, tiny: bool) -> tuple[Tensor, ...]:
            modules, n, width = (1, 20, 80) if tiny else (2, 2001, d)
            keys = torch.randn(modules, n, width, device=device).to(dtype)
            return keys, torch.zeros(modules, width, width, device=device)

        return Tunable(
            "covariance",
            shape_class,
            CANDIDATES[shape_class],
            inputs,
            call=lambda inputs, config: covariance(*inputs, config),
            exact=lambda inputs: inputs[1].double() + inputs[0].double().mT @ inputs[0].double(),
            writes=1,
        )

    return [
        choice("bfloat16, few features", 1024, torch.bfloat16),
        choice("bfloat16, many features", 4096, torch.bfloat16),
        choice("float32, many features", 4096, torch.float32),
    ]
