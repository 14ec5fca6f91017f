"""Adding a low-rank shift to a weight in place, ``W ← round(W + Aᵀ K)``.

``A`` (left) ``[modules, n, d_out]`` float32, ``K`` (right) ``[modules, n, d_in]`` float32 or
bfloat16, ``W`` ``[modules, d_out, d_in]`` bf16, fp16 or float32; all of any strides, so that a
transposed ``Conv1D`` weight needs nothing else. The sum is taken in float32 and rounded once; no
matrix of W's size exists beside W.

Floor for one module: ``2 n d_out d_in`` FLOPs on the 16-bit tensor cores for each product of parts
(see ``tile_product``), three where ``K`` is bfloat16 and six where it is float32; the weight (and
the remainder) read and written once; ``n (d_out + d_in)`` elements of the factors read.
Stochastic rounding adds a Philox block for four elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.launch import Config, Example, interprets, launch
from pyeditfast_kernels.modules import aligned
from pyeditfast_kernels.philox import blocks_side_by_side, uniform, words_of_part
from pyeditfast_kernels.tile_order import grouped_tile
from pyeditfast_kernels.tile_product import quarters, tile_product, to_bfloat16, widened
from pyeditfast_kernels.tuned import Tunable, describe_dtype, tuned_config

SQUARE = Config(
    "128 × 128",
    {"BLOCK_OUT": 128, "BLOCK_IN": 128, "BLOCK_K": 32},
    num_warps=8,
    num_stages=3,
    why="two programs share a multiprocessor of sm_90: one multiplies while the other writes",
)
NARROW = Config(
    "128 × 64",
    {"BLOCK_OUT": 128, "BLOCK_IN": 64, "BLOCK_K": 32},
    num_warps=8,
    num_stages=3,
    why="three parts of both factors leave registers for half of the columns",
)
FINE = Config(
    "64 × 64",
    {"BLOCK_OUT": 64, "BLOCK_IN": 64, "BLOCK_K": 32},
    num_warps=4,
    num_stages=3,
    why="rows that are not aligned to 16 bytes: fewer addresses a thread",
)


SQUARE_AHEAD = Config(
    "128 × 128, 4 stages",
    {"BLOCK_OUT": 128, "BLOCK_IN": 128, "BLOCK_K": 32},
    num_warps=8,
    num_stages=4,
    why="for `make tune`: one more block's loads are under way",
)
WIDE = Config(
    "64 × 128, 4 warps",
    {"BLOCK_OUT": 64, "BLOCK_IN": 128, "BLOCK_K": 32},
    num_warps=4,
    num_stages=4,
    why="for `make tune`: long rows of the weight, and three programs a multiprocessor",
)
NARROW_AHEAD = Config(
    "128 × 64, 4 warps",
    {"BLOCK_OUT": 128, "BLOCK_IN": 64, "BLOCK_K": 32},
    num_warps=4,
    num_stages=4,
    why="for `make tune`: a thread holds twice the accumulator, and there are more programs",
)

CANDIDATES = {
    "bfloat16 weight, bfloat16 keys, nearest": (SQUARE, SQUARE_AHEAD, WIDE),
    "bfloat16 weight, float32 keys, nearest": (NARROW, NARROW_AHEAD, WIDE),
}
"""By class of shapes, what ``make tune`` chooses from; the first is the default."""


def choose_config(
    right: torch.dtype,
    is_aligned: bool,
    weight: torch.dtype = torch.bfloat16,
    rounding: str = "nearest",
    device: torch.device | None = None,
) -> Config:
    """Return the configuration for keys of dtype ``right``: that tuned for ``device``, if any."""
    if not is_aligned:
        return FINE
    shape_class = f"{describe_dtype(weight)} weight, {describe_dtype(right)} keys, {rounding}"
    default = SQUARE if right == torch.bfloat16 else NARROW
    return tuned_config("apply_shift", shape_class, CANDIDATES, device) or default


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Convert float32 to ``dtype``, which holds every value of ``x``."""
    if dtype == tl.bfloat16:
        # By bits, since the interpreter's conversion spoils numbers below 2⁻¹²⁶.
        bits = x.to(tl.uint32, bitcast=True)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def round_nearest(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the float32 ``x`` rounded to ``dtype``, ties to even, as float32."""
    if dtype == tl.bfloat16:
        return to_bfloat16(x, INTERPRETED).to(tl.float32)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def round_stochastically(x, uniform, dtype: tl.constexpr):
    """Return one of the two neighbours of the float32 ``x`` in 16-bit ``dtype``, as float32.

    The upper one where ``uniform`` is below ``(x − lower) / (upper − lower)``; the comparison is
    exact. Finite numbers do not become infinite.
    """
    magnitude = tl.abs(x)
    if dtype == tl.bfloat16:
        bits = magnitude.to(tl.uint32, bitcast=True)
        small_bits = bits & 0xFFFF0000
        large_bits = tl.where(small_bits == 0x7F7F0000, small_bits, small_bits + 0x10000)
        small = small_bits.to(tl.float32, bitcast=True)
        large = large_bits.to(tl.float32, bitcast=True)
        # In units of the gap, which may be too small for a product with uniform.
        rest = (bits & 0xFFFF).to(tl.float32) * (1.0 / 65536.0)
        gap = 1.0
    else:
        nearest = magnitude.to(tl.float16)
        code = nearest.to(tl.uint16, bitcast=True)
        code = tl.where(nearest.to(tl.float32) > magnitude, code - 1, code)
        small = code.to(tl.float16, bitcast=True).to(tl.float32)
        next_code = tl.where(code == 0x7BFF, code, code + 1)
        large = next_code.to(tl.float16, bitcast=True).to(tl.float32)
        rest = magnitude - small
        gap = large - small
    threshold = uniform * gap
    grows = tl.where(x < 0, threshold >= gap - rest, threshold < rest)
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    rounded = tl.where(grows, large, small).to(tl.uint32, bitcast=True) | sign
    rounded = rounded.to(tl.float32, bitcast=True)
    return tl.where(magnitude < float("inf"), rounded, x)


@triton.jit
def apply_part(
    weight,
    remainder,
    shift,
    seed,
    index,
    first_row,
    first_column,
    d_out,
    d_in,
    weight_stride_row,
    weight_stride_column,
    remainder_stride_row,
    remainder_stride_column,
    ROUNDING: tl.constexpr,
    PHILOX_BLOCKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add ``shift`` ``[ROWS, COLUMNS]`` to the part of the weight that begins at ``first_row``."""
    dtype: tl.constexpr = weight.dtype.element_ty
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None]
    columns = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    inside = (first_row + rows < d_out) & (first_column + columns < d_in)
    place = weight + first_row * weight_stride_row + first_column * weight_stride_column
    place += rows * weight_stride_row + columns * weight_stride_column
    before = widened(tl.load(place, mask=inside, other=0.0), INTERPRETED).to(tl.float32)
    if ROUNDING == "compensated":
        kept = remainder + first_row * remainder_stride_row
        kept += first_column * remainder_stride_column
        kept += rows * remainder_stride_row + columns * remainder_stride_column
        shift += widened(tl.load(kept, mask=inside, other=0.0), INTERPRETED).to(tl.float32)
    exact = before + shift
    if ROUNDING == "stochastic":
        word = words_of_part(
            seed, index, first_row, first_column, d_in, PHILOX_BLOCKS, True, ROWS, COLUMNS
        )
        rounded = round_stochastically(exact, uniform(word), dtype)
    else:
        rounded = round_nearest(exact, dtype, INTERPRETED)
    tl.store(place, narrowed(rounded, dtype), mask=inside)
    if ROUNDING == "compensated":
        if dtype == tl.float32:
            # Rounding loses nothing; what the sum itself loses is Knuth's two-sum.
            added = exact - before
            lost = (before - (exact - added)) + (shift - added)
        else:
            lost = exact - rounded
        tl.store(kept, narrowed(round_nearest(lost, dtype, INTERPRETED), dtype), mask=inside)


@triton.jit(do_not_specialize=["seed", "index", "n", "row_tiles", "column_tiles"])
def apply_shift_kernel(
    weight,
    remainder,
    left,
    right,
    seed: tl.uint64,
    index: tl.int64,
    n,
    d_out,
    d_in,
    row_tiles,
    column_tiles,
    weight_stride_module,
    weight_stride_row,
    weight_stride_column,
    remainder_stride_module,
    remainder_stride_row,
    remainder_stride_column,
    left_stride_module,
    left_stride_n,
    left_stride_out,
    right_stride_module,
    right_stride_n,
    right_stride_in,
    ROUNDING: tl.constexpr,
    PHILOX_BLOCKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = weight.dtype.element_ty
    tiles = row_tiles * column_tiles
    tile_row, tile_column = grouped_tile(tl.program_id(0) % tiles, row_tiles, column_tiles)
    module = (tl.program_id(0) // tiles).to(tl.int64)
    first_row = tile_row.to(tl.int64) * BLOCK_OUT
    first_column = tile_column.to(tl.int64) * BLOCK_IN
    shift = tile_product(
        left + module * left_stride_module,
        right + module * right_stride_module,
        first_row + tl.arange(0, BLOCK_OUT),
        first_column + tl.arange(0, BLOCK_IN),
        d_out,
        d_in,
        0,
        n,
        left_stride_out,
        left_stride_n,
        right_stride_n,
        right_stride_in,
        BLOCK_OUT,
        BLOCK_IN,
        BLOCK_K,
        dtype == tl.float32,
        INTERPRETED,
    )  # [BLOCK_OUT, BLOCK_IN]
    weight += module * weight_stride_module
    if ROUNDING == "compensated":
        remainder += module * remainder_stride_module
    index += module * d_out * d_in
    parts = quarters(shift, BLOCK_OUT, BLOCK_IN)
    for quarter in tl.static_range(4):
        apply_part(
            weight,
            remainder,
            parts[quarter],
            seed,
            index,
            first_row,
            first_column + quarter * (BLOCK_IN // 4),
            d_out,
            d_in,
            weight_stride_row,
            weight_stride_column,
            remainder_stride_row,
            remainder_stride_column,
            ROUNDING,
            PHILOX_BLOCKS,
            INTERPRETED,
            BLOCK_OUT,
            BLOCK_IN // 4,
        )


def apply_shift_(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    rounding: str,
    seed: int | None = None,
    remainder: Tensor | None = None,
    index: int = 0,
    config: Config | None = None,
) -> Tensor:
    """Add ``leftᵀ right`` to ``weight`` ``[modules, d_out, d_in]`` in place and return it.

    ``left`` ``[modules, n, d_out]`` float32, ``right`` ``[modules, n, d_in]`` float32 or bfloat16,
    ``remainder`` like ``weight``. Stochastic rounding takes the random number ``index + i`` of
    ``seed`` for element ``i``, row by row. ``config`` is that of ``choose_config`` unless given.
    """
    modules, d_out, d_in = weight.shape
    if config is None:
        fits = aligned(weight, left, right, *([] if remainder is None else [remainder]))
        config = choose_config(right.dtype, fits, weight.dtype, rounding, weight.device)
    row_tiles = triton.cdiv(d_out, config.sizes["BLOCK_OUT"])
    column_tiles = triton.cdiv(d_in, config.sizes["BLOCK_IN"])
    blocks = None
    if rounding == "stochastic":
        part = config.sizes["BLOCK_OUT"] * config.sizes["BLOCK_IN"] // 4
        blocks = blocks_side_by_side(d_in, index, weight.dtype, part, config)
    kept = (0, 0, 0) if remainder is None else remainder.stride()
    launch(
        apply_shift_kernel,
        (modules * row_tiles * column_tiles,),
        config,
        weight=weight,
        remainder=remainder,
        left=left,
        right=right,
        seed=seed or 0,
        index=index,
        n=left.shape[1],
        d_out=d_out,
        d_in=d_in,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        weight_stride_module=weight.stride(0),
        weight_stride_row=weight.stride(1),
        weight_stride_column=weight.stride(2),
        remainder_stride_module=kept[0],
        remainder_stride_row=kept[1],
        remainder_stride_column=kept[2],
        left_stride_module=left.stride(0),
        left_stride_n=left.stride(1),
        left_stride_out=left.stride(2),
        right_stride_module=right.stride(0),
        right_stride_n=right.stride(1),
        right_stride_in=right.stride(2),
        ROUNDING=rounding,
        PHILOX_BLOCKS=blocks,
        INTERPRETED=interprets(),
    )
    return weight


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""

    def example(
        weight: str, right: str, rounding: str, d_out: int, d_in: int, layout: str = "Linear"
    ) -> Example:
        def call() -> None:
            shape = (2, d_out, d_in) if layout == "Linear" else (2, d_in, d_out)
            place = torch.empty(shape, dtype=dtypes[weight], device="meta")
            place = place if layout == "Linear" else place.mT
            apply_shift_(
                place,
                torch.empty(2, 397, d_out, device="meta"),
                torch.empty(2, 397, d_in, dtype=dtypes[right], device="meta"),
                rounding,
                seed=2**40 if rounding == "stochastic" else None,
                remainder=place if rounding == "compensated" else None,
                index=2**40,
            )

        kernels = (apply_shift_kernel.__name__,)
        name = f"{layout} {d_out} × {d_in}, {weight}, {right} keys, {rounding}"
        return Example(name, call, kernels, kernels if d_out % 16 == d_in % 16 == 0 else ())

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    cases = [
        (weight, right, rounding)
        for weight in dtypes
        for right in ("bf16", "fp32")
        for rounding in ("nearest", "stochastic", "compensated")
        if not (weight == "fp32" and rounding == "stochastic")
    ]
    return [
        *(example(*case, 4096, 14336) for case in cases),
        *(example(*case, 4096, 14336, "Conv1D") for case in cases if case[0] == "bf16"),
        *(example(*case, 4095, 14335) for case in cases if case[0] != "fp16"),
    ]


def tunable() -> list[Tunable]:
    """Return what ``make tune`` chooses between."""

    def choice(right: torch.dtype) -> Tunable:
        shape_class = f"bfloat16 weight, {describe_dtype(right)} keys, nearest"

        def inputs(device: torch.device, tiny: bool) -> tuple[Tensor, ...]:
            modules, n, d_out, d_in = (1, 20, 80, 144) if tiny else (2, 397, 4096, 14336)
            return (
                (0.02 * torch.randn(modules, d_out, d_in, device=device)).bfloat16(),
                1e-4 * torch.randn(modules, n, d_out, device=device),
                torch.randn(modules, n, d_in, device=device).to(right),
            )

        return Tunable(
            "apply_shift",
            shape_class,
            CANDIDATES[shape_class],
            inputs,
            call=lambda inputs, config: apply_shift_(*inputs, "nearest", config=config),
            exact=lambda inputs: inputs[0].double() + inputs[1].double().mT @ inputs[2].double(),
            writes=0,
        )

    return [choice(torch.bfloat16), choice(torch.float32)]
