"""What the kernels on main and side memories share: reading a memory by its number, reading a
module's input, and taking a tile of several memories apart.

Memories are ``[d_out, d_in]`` tensors of their own, never stacked, since they come and go one by
one: a kernel takes ``main`` and ``side_0`` … ``side_7``, of which those that do not exist are None.
All have the strides of ``main`` (see ``in_one_layout``). Number 0 is the main memory, number ``s``
side memory ``s − 1``.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.activations import activate
from pyeditfast_kernels.tile_product import add_product, halves, to_bfloat16, widened

MOST_SIDES = 8


def in_one_layout(main: Tensor, sides: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the memories with equal strides: as they are, or else, where they differ, contiguous.

    A side memory begins as a copy of the main memory and so has its strides; only where a user
    changed that is anything copied.
    """
    if all(side.stride() == main.stride() for side in sides):
        return main, list(sides)
    return main.contiguous(), [side.contiguous() for side in sides]


def side_arguments(sides: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Return ``side_0`` … ``side_7`` for a kernel; raises ``ValueError`` for more than 8."""
    if len(sides) > MOST_SIDES:
        raise ValueError(f"there are {len(sides)} side memories; a kernel takes {MOST_SIDES}")
    filled = [*sides, *[None] * (MOST_SIDES - len(sides))]
    return {f"side_{number}": side for number, side in enumerate(filled)}


def strides_of_input(name: str, tensor: Tensor | None) -> dict[str, int]:
    """Return the strides of an input ``[batch, tokens, d]``, or of None, for a kernel."""
    batch, token, d = (0, 0, 0) if tensor is None else tensor.stride()
    return {f"{name}_stride_batch": batch, f"{name}_stride_token": token, f"{name}_stride_d": d}


@triton.jit
def memory_pointer(number, main, side_0, side_1, side_2, side_3, side_4, side_5, side_6, side_7):
    """Return the pointers to the memories of ``number``, a number or a tensor of them.

    Numbers without a memory give ``main``.
    """
    pointer = main
    if side_0 is not None:
        pointer = tl.where(number == 1, side_0, pointer)
    if side_1 is not None:
        pointer = tl.where(number == 2, side_1, pointer)
    if side_2 is not None:
        pointer = tl.where(number == 3, side_2, pointer)
    if side_3 is not None:
        pointer = tl.where(number == 4, side_3, pointer)
    if side_4 is not None:
        pointer = tl.where(number == 5, side_4, pointer)
    if side_5 is not None:
        pointer = tl.where(number == 6, side_5, pointer)
    if side_6 is not None:
        pointer = tl.where(number == 7, side_6, pointer)
    if side_7 is not None:
        pointer = tl.where(number == 8, side_7, pointer)
    return pointer


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round the float32 ``x`` to the nearest ``dtype``, ties to even.

    In the interpreter bfloat16 numbers stay float32.
    """
    if dtype == tl.bfloat16:
        return to_bfloat16(x, INTERPRETED)
    else:
        return x.to(dtype)


@triton.jit
def load_input(pointers, gate_pointers, mask, GATE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return a tile of a module's input, zeros where ``mask`` is False.

    With a gate that is ``act(gate) · x`` in float32, rounded once to the dtype of ``x`` so that
    16-bit tensor cores take it. (A model that writes the product rounds the activation, too.)
    """
    x = widened(tl.load(pointers, mask=mask, other=0.0), INTERPRETED)
    if GATE is None:
        return x
    else:
        gate = widened(tl.load(gate_pointers, mask=mask, other=0.0), INTERPRETED)
        product = activate(gate.to(tl.float32), GATE) * x.to(tl.float32)
        return rounded(product, pointers.dtype.element_ty, INTERPRETED)


@triton.jit
def add_tile_product(left, right, total, FLOAT32: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return ``total + left @ right``.

    Float32 operands keep all digits (see ``tile_product``). Sums of 16-bit products are left to the
    tensor cores, which cut them off at about 2⁻²³ a step: nothing beside the rounding of a 16-bit
    output, and alike in a gap's two outputs.
    """
    if FLOAT32:
        nothing = tl.zeros(total.shape, tl.float32)
        return total + add_product(left, right, nothing, True, INTERPRETED)
    else:
        return tl.dot(left, right, total)


@triton.jit
def parts_of(tile, PARTS: tl.constexpr):
    """Return the two-dimensional ``tile`` with its columns cut into ``PARTS``, left to right.

    Nothing moves: the columns of a part lie in the registers of the threads that use them.
    """
    if PARTS == 1:
        return (tile,)
    else:
        left, right = halves(tile, tile.shape[0], tile.shape[1])
        return parts_of(left, PARTS // 2) + parts_of(right, PARTS // 2)
