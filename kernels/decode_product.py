"""Products of single tokens and memories, for ``routed_decode`` and ``decode_gap``.

``Σ_k W_m[o, k] · x[b, k]`` in float32 for rows ``x`` ``[batch, 1, d_in]`` and memories ``W_m``
``[d_out, d_in]``: main and up to eight sides, separate tensors of any strides; with a route each
row by its own memory, else every row by every memory. With a gate ``act(gate) · x``, rounded to
the dtype of ``x``, stands in place of ``x`` and is never written.

A program owns a tile of rows of W and a part of ``d_in``. It goes through the memories, past those
that no row of its block uses without reading them; rows of ``x`` that another memory answers are
not read either. So all rows of a memory share one read of it, and programs have the same work
whichever memories are in use. ``d_in`` is cut until programs fill the chip; another kernel adds
their parts in order. The cut does not depend on the batch, nor a row's sum on the other rows.
Beyond 16 rows memories are read again for every 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.activations import activate, activation_name
from pyeditfast_kernels.decode_configs import choose_config, choose_splits
from pyeditfast_kernels.launch import Config, interprets, launch
from pyeditfast_kernels.tile_product import SPAN, add_product, to_bfloat16, widened

MOST_SIDES = 8


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32 to ``dtype``; in the interpreter a bfloat16 stays float32, since ``tl.dot`` and
    stores are wrong there.
    """
    if dtype == tl.bfloat16:
        return to_bfloat16(x, INTERPRETED)
    else:
        return x.to(dtype)


@triton.jit
def rows_product(
    weight,
    x,
    gate,
    outs,
    rows,
    is_out,
    wanted,
    begin,
    end,
    stride_out,
    stride_in,
    x_stride_row,
    x_stride_in,
    gate_stride_row,
    gate_stride_in,
    GATE_ACTIVATION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Return ``Σ weight[outs, k] · x[rows, k]`` over ``begin ≤ k < end``, as ``tile_product`` does.

    ``outs`` ``[BLOCK_OUT]`` and ``rows`` ``[BLOCK_ROWS]`` are int64; zeros where not ``wanted``.
    """
    STEPS: tl.constexpr = SPAN // BLOCK_IN
    lanes = tl.arange(0, BLOCK_IN)  # [BLOCK_IN]
    far_lanes = lanes.to(tl.int64)
    weight_offsets = (outs * stride_out)[:, None] + (far_lanes * stride_in)[None, :]
    x_offsets = (far_lanes * x_stride_in)[:, None] + (rows * x_stride_row)[None, :]
    if gate is not None:
        gate_offsets = (far_lanes * gate_stride_in)[:, None] + (rows * gate_stride_row)[None, :]
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    part = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    # At least one step, as in tile_product.
    for step in range(0, tl.maximum(tl.cdiv(end - begin, BLOCK_IN), 1)):
        start = begin + step * BLOCK_IN
        inside = start + lanes < end
        far = tl.cast(start, tl.int64)
        w = tl.load(
            weight + far * stride_in + weight_offsets,
            mask=is_out[:, None] & inside[None, :],
            other=0.0,
        )  # [BLOCK_OUT, BLOCK_IN]
        mask = inside[:, None] & wanted[None, :]
        a = tl.load(x + far * x_stride_in + x_offsets, mask=mask, other=0.0)
        if gate is not None:
            g = tl.load(gate + far * gate_stride_in + gate_offsets, mask=mask, other=0.0)
            product = activate(g.to(tl.float32), GATE_ACTIVATION) * a.to(tl.float32)
            a = rounded(product, x.dtype.element_ty, INTERPRETED)
        w = widened(w, INTERPRETED)
        a = widened(a, INTERPRETED)  # [BLOCK_IN, BLOCK_ROWS]
        if x.dtype.element_ty == tl.float32:
            nothing = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
            total += add_product(w, a, nothing, True, INTERPRETED)
        else:
            part = tl.dot(w, a, part)
            if tl.cast(step, tl.int32) % STEPS == STEPS - 1:
                total += part
                part = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    return total + part


@triton.jit(do_not_specialize=["batch", "memories", "splits", "tiles"])
def decode_product_kernel(
    x,
    gate,
    route,
    main,
    side_1,
    side_2,
    side_3,
    side_4,
    side_5,
    side_6,
    side_7,
    side_8,
    bias,
    output,
    partial,
    batch,
    memories,
    d_out,
    d_in,
    chunk,
    splits,
    tiles,
    x_stride_row,
    x_stride_in,
    gate_stride_row,
    gate_stride_in,
    route_stride,
    bias_stride,
    main_stride_out,
    main_stride_in,
    side_1_stride_out,
    side_1_stride_in,
    side_2_stride_out,
    side_2_stride_in,
    side_3_stride_out,
    side_3_stride_in,
    side_4_stride_out,
    side_4_stride_in,
    side_5_stride_out,
    side_5_stride_in,
    side_6_stride_out,
    side_6_stride_in,
    side_7_stride_out,
    side_7_stride_in,
    side_8_stride_out,
    side_8_stride_in,
    GATE_ACTIVATION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Write ``output``, or else the parts, as ``decode_product`` says."""
    sides = (side_1, side_2, side_3, side_4, side_5, side_6, side_7, side_8)
    sides_stride_out = (
        side_1_stride_out,
        side_2_stride_out,
        side_3_stride_out,
        side_4_stride_out,
        side_5_stride_out,
        side_6_stride_out,
        side_7_stride_out,
        side_8_stride_out,
    )
    sides_stride_in = (
        side_1_stride_in,
        side_2_stride_in,
        side_3_stride_in,
        side_4_stride_in,
        side_5_stride_in,
        side_6_stride_in,
        side_7_stride_in,
        side_8_stride_in,
    )
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    block = tl.program_id(0) // tiles // splits
    outs = tile.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)  # [BLOCK_OUT]
    rows = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    is_row = rows < batch
    if route is not None:
        number = tl.load(route + rows * route_stride, mask=is_row, other=-1)
        number = tl.where((number >= 0) & (number < memories), number + 1, 0)  # [BLOCK_ROWS]
    begin = split * chunk
    end = tl.minimum(begin + chunk, d_in)
    for memory in range(0, memories + 1):
        wanted = is_row
        if route is not None:
            wanted = is_row & (number == memory)
        if tl.sum(wanted.to(tl.int32), 0) > 0:
            weight = main
            stride_out = tl.cast(main_stride_out, tl.int64)
            stride_in = tl.cast(main_stride_in, tl.int64)
            for side in tl.static_range(8):
                if sides[side] is not None:
                    chosen = memory == side + 1
                    weight = tl.where(chosen, sides[side], weight)
                    side_stride_out = tl.cast(sides_stride_out[side], tl.int64)
                    stride_out = tl.where(chosen, side_stride_out, stride_out)
                    side_stride_in = tl.cast(sides_stride_in[side], tl.int64)
                    stride_in = tl.where(chosen, side_stride_in, stride_in)
            tile_sum = rows_product(
                weight,
                x,
                gate,
                outs,
                rows,
                outs < d_out,
                wanted,
                begin,
                end,
                stride_out,
                stride_in,
                x_stride_row,
                x_stride_in,
                gate_stride_row,
                gate_stride_in,
                GATE_ACTIVATION,
                INTERPRETED,
                BLOCK_OUT,
                BLOCK_IN,
                BLOCK_ROWS,
            )  # [BLOCK_OUT, BLOCK_ROWS]
            places = (rows * d_out)[None, :] + outs[:, None]
            mask = (outs < d_out)[:, None] & wanted[None, :]
            if partial is None:
                if bias is not None:
                    offset = tl.load(bias + outs * bias_stride, mask=outs < d_out, other=0.0)
                    tile_sum += offset.to(tl.float32)[:, None]
                tile_sum = rounded(tile_sum, output.dtype.element_ty, INTERPRETED)
                tl.store(output + places, tile_sum, mask=mask)
            else:
                slab = split.to(tl.int64)
                if route is None:
                    slab += memory * splits
                tl.store(partial + slab * batch * d_out + places, tile_sum, mask=mask)


def decode_product(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    route: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_activation: str | None,
    output: Tensor | None,
    config: Config | None,
    splits: int | None,
) -> tuple[Tensor | None, int]:
    """Return the parts of all products, float32, and the number of splits.

    The parts are ``[splits, batch, d_out]`` with a route and ``[1 + memories, splits, batch,
    d_out]`` without one. With a route and one split they are None: then ``output``
    ``[batch, 1, d_out]``, contiguous, is written, with ``bias``. ``config`` and ``splits`` are
    those of ``choose_config`` and ``choose_splits`` unless given.
    """
    batch, d_in, d_out = x.shape[0], x.shape[2], main.shape[0]
    inputs = [x] if gate is None else [x, gate]
    config = config or choose_config(inputs, [main, *sides])
    tiles = triton.cdiv(d_out, config.sizes["BLOCK_OUT"])
    depth = config.sizes["BLOCK_IN"]
    splits = splits or choose_splits(tiles, d_in)
    chunk = max(1, triton.cdiv(triton.cdiv(d_in, splits), depth)) * depth
    splits = max(1, triton.cdiv(d_in, chunk))
    partial = None
    if splits > 1 or route is None:
        shape = (
            (splits, batch, d_out) if route is not None else (1 + len(sides), splits, batch, d_out)
        )
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    places: dict[str, Tensor | int | None] = {}
    for number in range(MOST_SIDES):
        side = sides[number] if number < len(sides) else None
        places[f"side_{number + 1}"] = side
        places[f"side_{number + 1}_stride_out"] = 0 if side is None else side.stride(0)
        places[f"side_{number + 1}_stride_in"] = 0 if side is None else side.stride(1)
    launch(
        decode_product_kernel,
        (triton.cdiv(batch, config.sizes["BLOCK_ROWS"]) * splits * tiles,),
        config,
        x=x,
        gate=gate,
        route=route,
        main=main,
        bias=bias,
        output=output,
        partial=partial,
        batch=batch,
        memories=len(sides),
        d_out=d_out,
        d_in=d_in,
        chunk=chunk,
        splits=splits,
        tiles=tiles,
        x_stride_row=x.stride(0),
        x_stride_in=x.stride(2),
        gate_stride_row=0 if gate is None else gate.stride(0),
        gate_stride_in=0 if gate is None else gate.stride(2),
        route_stride=0 if route is None else route.stride(0),
        bias_stride=0 if bias is None else bias.stride(0),
        main_stride_out=main.stride(0),
        main_stride_in=main.stride(1),
        **places,
        GATE_ACTIVATION=activation_name(gate_activation),
        INTERPRETED=interprets(),
    )
    return partial, splits
