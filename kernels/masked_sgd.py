"""The step of a side memory in place, ``W' ← clamp(W' − lr · (mask · G + decay · W'), W ± c)``.

``W'`` (weight), ``W`` (main) and the gradient ``G`` ``[d_out, d_in]`` in bf16, fp16 or float32, of
any strides, so that a transposed ``Conv1D`` weight needs nothing else. ``mask`` is
``random_mask(seed, ratio)`` over the row-major index, computed where it is used. All is float32 and
rounded once; products and sums are rounded one by one, as in the reference, never fused.

Floor: ``W'``, ``W`` and ``G`` read and ``W'`` written once, and a Philox block for four elements.
For 14336 × 4096 bf16 elements an H200 (132 multiprocessors that start 128 lanes a cycle, 1.8 GHz, 4
TB/s) should need 117 µs of memory and, by the machine code for sm_90, 38 instructions an element,
73 µs, 11 of them for Philox and its comparison: memory binds. An estimate, not a measurement.

``masked_sgd_product`` has the form that multiplies ``G`` itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.launch import Config, Example, interprets, launch
from pyeditfast_kernels.masked_sgd_product import masked_sgd_product_
from pyeditfast_kernels.masked_step import mask_of, stepped
from pyeditfast_kernels.matrix_part import inside_of, offsets_of
from pyeditfast_kernels.philox import blocks_side_by_side
from pyeditfast_kernels.random_mask import is_far, last_kept

__all__ = ["masked_sgd_", "masked_sgd_product_"]

STREAM = Config(
    "64 × 64",
    {"BLOCK_OUT": 64, "BLOCK_IN": 64},
    num_warps=8,
    num_stages=1,
    why="16 elements a thread hide Philox's latency; lines of 128 bytes by rows and by columns",
)


@triton.jit(do_not_specialize=["seed", "last", "column_tiles"])
def masked_sgd_kernel(
    weight,
    grad,
    main,
    active,
    seed: tl.uint64,
    last,
    lr,
    weight_decay,
    norm_constraint,
    d_out,
    d_in,
    column_tiles,
    weight_stride_row,
    weight_stride_column,
    grad_stride_row,
    grad_stride_column,
    main_stride_row,
    main_stride_column,
    PHILOX_BLOCKS: tl.constexpr,
    FAR: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    if active is not None and tl.load(active) == 0:
        return
    dtype: tl.constexpr = weight.dtype.element_ty
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_OUT
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_IN
    inside = inside_of(row, column, d_out, d_in, BLOCK_OUT, BLOCK_IN)
    weight += offsets_of(row, column, weight_stride_row, weight_stride_column, BLOCK_OUT, BLOCK_IN)
    grad += offsets_of(row, column, grad_stride_row, grad_stride_column, BLOCK_OUT, BLOCK_IN)
    old = tl.load(weight, mask=inside, other=0.0)
    gradient = tl.load(grad, mask=inside, other=0.0)
    centre = old
    if norm_constraint is not None:
        main += offsets_of(row, column, main_stride_row, main_stride_column, BLOCK_OUT, BLOCK_IN)
        centre = tl.load(main, mask=inside, other=0.0)
    kept = mask_of(seed, last, row, column, d_in, PHILOX_BLOCKS, FAR, BLOCK_OUT, BLOCK_IN)
    new = stepped(
        old, gradient, centre, kept, lr, weight_decay, norm_constraint, dtype, INTERPRETED
    )
    tl.store(weight, new, mask=inside)


def masked_sgd_(
    weight: Tensor,
    grad: Tensor,
    main: Tensor,
    seed: int,
    ratio: float,
    lr: float,
    weight_decay: float,
    norm_constraint: float | None,
    active: Tensor | None,
) -> Tensor:
    """Take the step for ``grad`` ``[d_out, d_in]`` and return ``weight``.

    ``main`` is read only for a ``norm_constraint``. Where ``active``, one bool, is False nothing is
    written; the host does not look at it.
    """
    d_out, d_in = weight.shape
    part = STREAM.sizes["BLOCK_OUT"] * STREAM.sizes["BLOCK_IN"]
    column_tiles = triton.cdiv(d_in, STREAM.sizes["BLOCK_IN"])
    launch(
        masked_sgd_kernel,
        (triton.cdiv(d_out, STREAM.sizes["BLOCK_OUT"]) * column_tiles,),
        STREAM,
        weight=weight,
        grad=grad,
        main=main,
        active=active,
        seed=seed,
        last=last_kept(ratio),
        lr=float(lr),
        weight_decay=float(weight_decay),
        norm_constraint=None if norm_constraint is None else float(norm_constraint),
        d_out=d_out,
        d_in=d_in,
        column_tiles=column_tiles,
        weight_stride_row=weight.stride(0),
        weight_stride_column=weight.stride(1),
        grad_stride_row=grad.stride(0),
        grad_stride_column=grad.stride(1),
        main_stride_row=main.stride(0),
        main_stride_column=main.stride(1),
        PHILOX_BLOCKS=blocks_side_by_side(d_in, 0, weight.dtype, part, STREAM),
        FAR=is_far(d_out * d_in),
        INTERPRETED=interprets(),
    )
    return weight


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def example(
        weight: str, grad: str, d_out: int, d_in: int, layout: str = "Linear", bound: bool = True
    ) -> Example:
        def call() -> None:
            shape = (d_out, d_in) if layout == "Linear" else (d_in, d_out)
            matrix = torch.empty(shape, dtype=dtypes[weight], device="meta")
            gradient = torch.empty(shape, dtype=dtypes[grad], device="meta")
            if layout != "Linear":
                matrix, gradient = matrix.mT, gradient.mT
            active = torch.empty((), dtype=torch.bool, device="meta") if bound else None
            masked_sgd_(
                matrix, gradient, matrix, 2**40, 0.2, 1.0, 1e-5, 1.0 if bound else None, active
            )

        name = f"{layout} {d_out} × {d_in}, {weight}, {grad} gradient"
        name += "" if bound else ", no bound"
        wide = (masked_sgd_kernel.__name__,) if d_out % 16 == d_in % 16 == 0 else ()
        return Example(name, call, wide_loads=wide)

    return [
        example("bf16", "bf16", 4096, 14336),
        example("fp16", "fp16", 4096, 14336),
        example("fp32", "fp32", 4096, 14336),
        example("bf16", "fp32", 4096, 14336),
        example("bf16", "bf16", 4096, 14336, "Conv1D"),
        example("bf16", "bf16", 4095, 14335),
        example("bf16", "bf16", 65536, 131072, bound=False),
    ]
