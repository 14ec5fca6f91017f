"""The masked step of a side memory for the gradient of a linear module, ``G = dYᵀ X``.

``W' ← clamp(W' − lr · (mask · G + decay · W'), W ± c)`` in place, as in ``masked_sgd``, as the
epilogue of the product, so that no gradient matrix exists. ``W'`` (weight) and ``W`` (main)
``[d_out, d_in]`` in bf16, fp16 or float32; ``dY`` (output_grads) ``[n, d_out]`` and ``X`` (inputs)
``[n, d_in]`` of one of these dtypes; all of any strides. The product is accumulated in float32.

Floor: ``W'`` and ``W`` read and ``W'`` written once; ``2 n d_out d_in`` FLOPs on the 16-bit tensor
cores (six times that for float32 operands, whose parts are multiplied, see ``tile_product``); a
Philox block for four elements.

What 14336 × 4096 bf16 elements and 240 tokens should take on an H200 (132 multiprocessors that
start 128 lanes a cycle, 1.8 GHz, 4 TB/s), counted in the machine code for sm_90 and not measured:
the three matrices 88 µs, the product 36 µs, and 50 instructions an element 96 µs, of which the mask
is 15 (Philox 9, the rest comparison and a bit for each). A mask that is read instead, a bit an
element, would leave 68 µs of instructions, and memory would bind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.launch import Config, Example, interprets, launch
from pyeditfast_kernels.masked_step import masks_of_eight, stepped
from pyeditfast_kernels.matrix_part import inside_of, offsets_of
from pyeditfast_kernels.modules import aligned
from pyeditfast_kernels.philox import blocks_side_by_side
from pyeditfast_kernels.random_mask import is_far, last_kept, random_mask
from pyeditfast_kernels.tile_order import grouped_tile
from pyeditfast_kernels.tile_product import halves, tile_product
from pyeditfast_kernels.tuned import Tunable, describe_dtype, tuned_config

SQUARE = Config(
    "128 × 128",
    {"BLOCK_OUT": 128, "BLOCK_IN": 128, "BLOCK_K": 32},
    num_warps=8,
    num_stages=4,
    why="two programs share a multiprocessor of sm_90: one multiplies while the other steps",
)
NARROW = Config(
    "128 × 64",
    {"BLOCK_OUT": 128, "BLOCK_IN": 64, "BLOCK_K": 32},
    num_warps=8,
    num_stages=3,
    why="three parts of float32 operands, or two sums of a float32 weight, leave fewer registers",
)
FINE = Config(
    "64 × 64",
    {"BLOCK_OUT": 64, "BLOCK_IN": 64, "BLOCK_K": 32},
    num_warps=8,
    num_stages=3,
    why="rows that are not aligned to 16 bytes: fewer addresses a thread",
)
DEEP = Config(
    "128 × 128, 64 deep",
    {"BLOCK_OUT": 128, "BLOCK_IN": 128, "BLOCK_K": 64},
    num_warps=8,
    num_stages=2,
    why="for `make tune`: half the steps of 128 × 128, with fewer registers to spare",
)
WIDE = Config(
    "64 × 128, 4 warps",
    {"BLOCK_OUT": 64, "BLOCK_IN": 128, "BLOCK_K": 32},
    num_warps=4,
    num_stages=4,
    why="for `make tune`: four programs a multiprocessor, but half as much again from L2",
)

CANDIDATES = {"bfloat16 weight, bfloat16 gradients": (SQUARE, DEEP, WIDE)}
"""By class of shapes, what ``make tune`` chooses from; the first is the default."""


def choose_config(
    weight: torch.dtype,
    operands: torch.dtype,
    is_aligned: bool,
    device: torch.device | None = None,
) -> Config:
    """Return the configuration for a weight and operands of these dtypes: the tuned one, if any."""
    if not is_aligned:
        return FINE
    shape_class = f"{describe_dtype(weight)} weight, {describe_dtype(operands)} gradients"
    default = NARROW if torch.float32 in (weight, operands) else SQUARE
    return tuned_config("masked_sgd_product", shape_class, CANDIDATES, device) or default


@triton.jit
def row_quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return four parts of ``tile`` ``[ROWS, COLUMNS]``, top to bottom."""
    top, bottom = row_halves(tile, ROWS, COLUMNS)
    first, second = row_halves(top, ROWS // 2, COLUMNS)
    third, fourth = row_halves(bottom, ROWS // 2, COLUMNS)
    return first, second, third, fourth


@triton.jit
def row_halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the upper and the lower half of ``tile`` ``[ROWS, COLUMNS]``."""
    return tl.split(tl.permute(tl.reshape(tile, (2, ROWS // 2, COLUMNS)), (1, 2, 0)))


@triton.jit
def load_both(
    weight,
    main,
    norm_constraint,
    row,
    column,
    d_out,
    d_in,
    weight_stride_row,
    weight_stride_column,
    main_stride_row,
    main_stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return a part of the weight and one of main, which is left out where nothing is clamped."""
    inside = inside_of(row, column, d_out, d_in, ROWS, COLUMNS)
    weight += offsets_of(row, column, weight_stride_row, weight_stride_column, ROWS, COLUMNS)
    old = tl.load(weight, mask=inside, other=0.0)
    centre = old
    if norm_constraint is not None:
        main += offsets_of(row, column, main_stride_row, main_stride_column, ROWS, COLUMNS)
        centre = tl.load(main, mask=inside, other=0.0)
    return old, centre


@triton.jit(do_not_specialize=["seed", "last", "n", "row_tiles", "column_tiles"])
def masked_sgd_product_kernel(
    weight,
    output_grads,
    inputs,
    main,
    active,
    seed: tl.uint64,
    last,
    lr,
    weight_decay,
    norm_constraint,
    n,
    d_out,
    d_in,
    row_tiles,
    column_tiles,
    weight_stride_row,
    weight_stride_column,
    output_grads_stride_n,
    output_grads_stride_out,
    inputs_stride_n,
    inputs_stride_in,
    main_stride_row,
    main_stride_column,
    PHILOX_BLOCKS: tl.constexpr,
    FAR: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The step is taken in eight parts ``[ROWS, COLUMNS]``: left half, top to bottom, then right.

    The mask comes first, a bit a part: Philox needs the registers that the product needs later.
    """
    if active is not None and tl.load(active) == 0:
        return
    dtype: tl.constexpr = weight.dtype.element_ty
    ROWS: tl.constexpr = BLOCK_OUT // 4
    COLUMNS: tl.constexpr = BLOCK_IN // 2
    tile_row, tile_column = grouped_tile(tl.program_id(0), row_tiles, column_tiles)
    first_row = tile_row.to(tl.int64) * BLOCK_OUT
    first_column = tile_column.to(tl.int64) * BLOCK_IN
    bits = masks_of_eight(
        seed, last, first_row, first_column, d_in, PHILOX_BLOCKS, FAR, ROWS, COLUMNS
    )
    grad = tile_product(
        output_grads,
        inputs,
        first_row + tl.arange(0, BLOCK_OUT),
        first_column + tl.arange(0, BLOCK_IN),
        d_out,
        d_in,
        0,
        n,
        output_grads_stride_out,
        output_grads_stride_n,
        inputs_stride_n,
        inputs_stride_in,
        BLOCK_OUT,
        BLOCK_IN,
        BLOCK_K,
        dtype == tl.float32,
        INTERPRETED,
    )  # [BLOCK_OUT, BLOCK_IN]
    left, right = halves(grad, BLOCK_OUT, BLOCK_IN)
    parts = row_quarters(left, BLOCK_OUT, COLUMNS) + row_quarters(right, BLOCK_OUT, COLUMNS)
    next_old, next_centre = load_both(
        weight,
        main,
        norm_constraint,
        first_row,
        first_column,
        d_out,
        d_in,
        weight_stride_row,
        weight_stride_column,
        main_stride_row,
        main_stride_column,
        ROWS,
        COLUMNS,
    )
    for part in tl.static_range(8):
        old = next_old
        centre = next_centre
        if part < 7:
            # A part ahead: the compiler may not load before a store to what may be one place.
            next_old, next_centre = load_both(
                weight,
                main,
                norm_constraint,
                first_row + (part + 1) % 4 * ROWS,
                first_column + (part + 1) // 4 * COLUMNS,
                d_out,
                d_in,
                weight_stride_row,
                weight_stride_column,
                main_stride_row,
                main_stride_column,
                ROWS,
                COLUMNS,
            )
        new = stepped(
            old,
            parts[part],
            centre,
            (bits & (1 << (7 - part))) != 0,
            lr,
            weight_decay,
            norm_constraint,
            dtype,
            INTERPRETED,
        )
        row = first_row + part % 4 * ROWS
        column = first_column + part // 4 * COLUMNS
        places = weight + offsets_of(
            row, column, weight_stride_row, weight_stride_column, ROWS, COLUMNS
        )
        tl.store(places, new, mask=inside_of(row, column, d_out, d_in, ROWS, COLUMNS))


def masked_sgd_product_(
    weight: Tensor,
    output_grads: Tensor,
    inputs: Tensor,
    main: Tensor,
    seed: int,
    ratio: float,
    lr: float,
    weight_decay: float,
    norm_constraint: float | None,
    active: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """Take the step for the gradient ``output_gradsᵀ inputs`` and return ``weight``.

    ``output_grads`` ``[n, d_out]`` and ``inputs`` ``[n, d_in]`` have one dtype. ``config`` is that
    of ``choose_config`` unless given.
    """
    d_out, d_in = weight.shape
    if config is None:
        fits = aligned(weight, output_grads, inputs, main)
        config = choose_config(weight.dtype, inputs.dtype, fits, weight.device)
    part = config.sizes["BLOCK_OUT"] * config.sizes["BLOCK_IN"] // 8
    row_tiles = triton.cdiv(d_out, config.sizes["BLOCK_OUT"])
    column_tiles = triton.cdiv(d_in, config.sizes["BLOCK_IN"])
    launch(
        masked_sgd_product_kernel,
        (row_tiles * column_tiles,),
        config,
        weight=weight,
        output_grads=output_grads,
        inputs=inputs,
        main=main,
        active=active,
        seed=seed,
        last=last_kept(ratio),
        lr=float(lr),
        weight_decay=float(weight_decay),
        norm_constraint=None if norm_constraint is None else float(norm_constraint),
        n=inputs.shape[0],
        d_out=d_out,
        d_in=d_in,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        weight_stride_row=weight.stride(0),
        weight_stride_column=weight.stride(1),
        output_grads_stride_n=output_grads.stride(0),
        output_grads_stride_out=output_grads.stride(1),
        inputs_stride_n=inputs.stride(0),
        inputs_stride_in=inputs.stride(1),
        main_stride_row=main.stride(0),
        main_stride_column=main.stride(1),
        PHILOX_BLOCKS=blocks_side_by_side(d_in, 0, weight.dtype, part, config),
        FAR=is_far(d_out * d_in),
        INTERPRETED=interprets(),
    )
    return weight


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def example(
        weight: str,
        operands: str,
        d_out: int,
        d_in: int,
        layout: str = "Linear",
        bound: bool = True,
    ) -> Example:
        def call() -> None:
            shape = (d_out, d_in) if layout == "Linear" else (d_in, d_out)
            matrix = torch.empty(shape, dtype=dtypes[weight], device="meta")
            matrix = matrix if layout == "Linear" else matrix.mT
            output_grads = torch.empty(240, d_out, dtype=dtypes[operands], device="meta")
            inputs = torch.empty(240, d_in, dtype=dtypes[operands], device="meta")
            active = torch.empty((), dtype=torch.bool, device="meta") if bound else None
            step = (2**40, 0.2, 1.0, 1e-5, 1.0 if bound else None, active)
            masked_sgd_product_(matrix, output_grads, inputs, matrix, *step)

        kernels = (masked_sgd_product_kernel.__name__,)
        name = f"{layout} {d_out} × {d_in}, {weight}, {operands} gradients"
        name += "" if bound else ", no bound"
        return Example(name, call, kernels, kernels if d_out % 16 == d_in % 16 == 0 else ())

    return [
        example("bf16", "bf16", 4096, 14336),
        example("fp16", "fp16", 4096, 14336),
        example("fp32", "fp32", 4096, 14336),
        example("bf16", "fp32", 4096, 14336),
        example("fp32", "bf16", 4096, 14336),
        example("bf16", "bf16", 4096, 14336, "Conv1D"),
        example("bf16", "bf16", 4095, 14335),
        example("fp32", "fp32", 4095, 14335),
        example("bf16", "bf16", 65536, 131072, bound=False),
    ]


def tunable() -> list[Tunable]:
    """Return what ``make tune`` chooses between."""
    seed, ratio, lr, weight_decay, norm_constraint = 3, 0.2, 0.5, 1e-3, 0.1

    def inputs(device: torch.device, tiny: bool) -> tuple[Tensor, ...]:
        n, d_out, d_in = (40, 144, 160) if tiny else (240, 4096, 14336)
        return (
            (0.02 * torch.randn(d_out, d_in, device=device)).bfloat16(),
            (0.02 * torch.randn(n, d_out, device=device)).bfloat16(),
            torch.randn(n, d_in, device=device).bfloat16(),
            (0.02 * torch.randn(d_out, d_in, device=device)).bfloat16(),
        )

    def call(inputs: tuple[Tensor, ...], config: Config) -> Tensor:
        step = (seed, ratio, lr, weight_decay, norm_constraint, None)
        return masked_sgd_product_(*inputs, *step, config)

    def exact(inputs: tuple[Tensor, ...]) -> Tensor:
        weight, output_grads, rows, main = (tensor.double() for tensor in inputs)
        grad = output_grads.mT @ rows * random_mask(seed, ratio, weight.shape, weight.device)
        new = weight - lr * (grad + weight_decay * weight)
        return torch.clamp(new, main - norm_constraint, main + norm_constraint)

    (shape_class,) = CANDIDATES
    candidates = CANDIDATES[shape_class]
    return [Tunable("masked_sgd_product", shape_class, candidates, inputs, call, exact, writes=0)]
