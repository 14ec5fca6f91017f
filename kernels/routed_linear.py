"""A linear module with side memories, ``y = x W_rᵀ + b`` with a route ``r`` for every query.

``x`` ``[batch, tokens, d_in]``, ``main`` and up to eight ``sides`` ``[d_out, d_in]``, all of any
strides, in bf16, fp16 or float32. With a gate, of the shape of x, the input is ``act(gate) · x``:
the down projection of a gated feed-forward block. Here the route is decided, from whole prompts;
``routed_product`` computes the outputs where it is given.

Floor: ``2 (1 + M) rows · d_in · d_out`` FLOPs for M sides, x and the memories read once,
``rows · d_out`` elements written. For 512 rows, 14336 → 4096 and two sides that is 180 GFLOP and
370 MB: on an H200 0.24 ms at 750 TFLOP/s, a third of that at 4.5 TB/s.

A query's route needs all its tokens and all columns, and no output can be chosen before it. The
ways out, for the same example, counted, not measured:

1. Compute the gaps, write the main memory's outputs, and multiply the routed queries again with
   their side memory: 80 µs more where all are routed.
2. Keep the sums of all tiles in registers until a barrier of the whole grid: no bytes more, but
   only while three outputs fit the registers of all multiprocessors (25 of 34 MB here).
3. Write the outputs of all memories, then choose: 13 MB written instead of 4, up to 8 moved, most
   of it in L2, and two small kernels: 5 to 10 µs.

It is 3. ``memory_products_kernel`` writes the main memory's outputs to their place and the sides'
beside it; ``query_gaps_kernel`` reduces the distances; ``select_kernel`` decides, and moves the
outputs of routed queries alone. What is held beside is ``MOST_BESIDE`` bytes, or what one query
needs: larger batches are worked off in parts. Nothing depends on the data on the host.

Expected over three matrix products: 5 to 10 µs for the choice, about as much for the activations of
all outputs once a program's sums are complete, less what reading x once saves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.activation_gap import query_gaps, query_gaps_kernel
from pyeditfast_kernels.launch import Config, Example, launch
from pyeditfast_kernels.memory_products import (
    choose_config,
    is_hopper,
    memory_products,
    memory_products_kernel,
)
from pyeditfast_kernels.memory_tile import in_one_layout
from pyeditfast_kernels.modules import aligned
from pyeditfast_kernels.routed_product import routed_linear_with_route, routed_product_kernel

SELECT = Config(
    "8 tokens, 1024 columns",
    {"BLOCK_TOKENS": 8, "BLOCK_COLUMNS": 1024},
    num_warps=8,
    num_stages=1,
    why="four loads of 16 bytes a thread; 256 programs for 512 tokens of 4096 columns",
)

MOST_BESIDE = 1 << 28
"""Bytes of the side memories' outputs that are held at once."""


@triton.jit(do_not_specialize=["tokens", "token_blocks", "column_blocks"])
def select_kernel(
    gaps,
    thresholds,
    side_outputs,
    output,
    route,
    queries,
    tokens,
    d_out,
    token_blocks,
    column_blocks,
    thresholds_stride,
    SIDES: tl.constexpr,
    PADDED_SIDES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Decide the route of a query, note it, and move its block of a side memory's outputs."""
    column_block = tl.program_id(0) % column_blocks
    token_block = tl.program_id(0) // column_blocks % token_blocks
    query = (tl.program_id(0) // column_blocks // token_blocks).to(tl.int64)
    side = tl.arange(0, PADDED_SIDES)
    is_side = side < SIDES
    gap = tl.load(gaps + query * SIDES + side, mask=is_side, other=0.0)  # [PADDED_SIDES]
    threshold = tl.load(thresholds + side * thresholds_stride, mask=is_side, other=0.0)
    # A NaN is above nothing, nor is what is no side; the first of equals is chosen.
    above = gap > threshold
    largest = tl.max(tl.where(above, gap, float("-inf")), 0)
    first = tl.min(tl.where(above & (gap == largest), side, PADDED_SIDES), 0)
    chosen = tl.where(first < PADDED_SIDES, first, -1).to(tl.int64)
    if column_block + token_block == 0:
        tl.store(route + query, chosen)
    if chosen >= 0:
        token = token_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        mask = (token < tokens)[:, None] & (column < d_out)[None, :]
        place = (query * tokens + token)[:, None] * d_out + column[None, :]
        beside = chosen * queries * tokens * d_out
        tl.store(output + place, tl.load(side_outputs + beside + place, mask=mask), mask=mask)


KERNELS = (memory_products_kernel, query_gaps_kernel, select_kernel, routed_product_kernel)
"""What the launchers of this file launch."""


def routed_linear(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    thresholds: Tensor,
    bias: Tensor | None,
    activation: str | None,
    reduction: str,
    mask: Tensor | None,
    gate: Tensor | None,
    gate_activation: str | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide the routes and return outputs, routes and gaps.

    The output is ``[batch, tokens, d_out]`` in the dtype of x, the route ``[batch]`` int64 with −1
    for the main memory, the gaps ``[batch, sides]`` float32; ``thresholds`` ``[sides]``. ``config``
    is that of ``choose_config`` unless given.
    """
    main, sides = in_one_layout(main, sides)
    batch, tokens, _ = x.shape
    d_out = main.shape[0]
    output = torch.empty((batch, tokens, d_out), dtype=x.dtype, device=x.device)
    route = torch.empty((batch,), dtype=torch.int64, device=x.device)
    gaps = torch.empty((batch, len(sides)), dtype=torch.float32, device=x.device)
    a_query = len(sides) * tokens * d_out
    at_once = min(batch, max(1, MOST_BESIDE // max(1, a_query * x.dtype.itemsize)))
    beside = torch.empty(at_once * a_query, dtype=x.dtype, device=x.device)
    inputs = [x] if gate is None else [x, gate]
    config = config or choose_config(
        at_once * tokens,
        d_out,
        1 + len(sides),
        x.dtype,
        aligned(*inputs, main, *sides),
        activation,
        gated=gate is not None,
        hopper=is_hopper(x.device),
    )

    def decide(
        x: Tensor,
        mask: Tensor | None,
        gate: Tensor | None,
        output: Tensor,
        route: Tensor,
        gaps: Tensor,
    ) -> None:
        distances = memory_products(
            x, main, sides, bias, activation, gate, gate_activation, output, beside, config
        )
        queries = x.shape[0]
        query_gaps(distances, queries, tokens, reduction, mask, gaps)
        token_blocks = max(1, triton.cdiv(tokens, SELECT.sizes["BLOCK_TOKENS"]))
        column_blocks = max(1, triton.cdiv(d_out, SELECT.sizes["BLOCK_COLUMNS"]))
        launch(
            select_kernel,
            (queries * token_blocks * column_blocks,),
            SELECT,
            gaps=gaps,
            thresholds=thresholds,
            side_outputs=beside,
            output=output,
            route=route,
            queries=queries,
            tokens=tokens,
            d_out=d_out,
            token_blocks=token_blocks,
            column_blocks=column_blocks,
            thresholds_stride=thresholds.stride(0),
            SIDES=len(sides),
            PADDED_SIDES=triton.next_power_of_2(max(1, len(sides))),
        )

    if at_once == batch:
        decide(x, mask, gate, output, route, gaps)
        return output, route, gaps
    for first in range(0, batch, at_once):
        part = slice(first, first + at_once)
        decide(
            x[part],
            None if mask is None else mask[part],
            None if gate is None else gate[part],
            output[part],
            route[part],
            gaps[part],
        )
    return output, route, gaps


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""

    def example(
        name: str,
        batch: int,
        tokens: int,
        sides: int,
        *,
        activation: str | None = "silu",
        gate: str | None = None,
        routed: bool = False,
        layout: str = "Linear",
        d_in: int = 14336,
        d_out: int = 4096,
    ) -> Example:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]

        def call() -> None:
            x = torch.empty(batch, tokens, d_in, dtype=dtype, device="meta")
            shape = (d_out, d_in) if layout == "Linear" else (d_in, d_out)
            memories = torch.empty(1 + sides, *shape, dtype=dtype, device="meta")
            main, *others = memories if layout == "Linear" else memories.mT
            gates = None if gate is None else x
            if routed:
                route = torch.empty(batch, dtype=torch.int64, device="meta")
                routed_linear_with_route(x, main, others, route, None, gates, gate)
            else:
                thresholds = torch.empty(sides, device="meta")
                routed_linear(
                    x, main, others, thresholds, None, activation, "auto", None, gates, gate
                )

        words = [name, f"{batch} × {tokens} tokens", f"{sides} sides"]
        words += ["route given"] if routed else [str(activation)]
        words += [] if gate is None else [f"{gate} gate"]
        words += [layout] if layout != "Linear" else []
        product = routed_product_kernel if routed else memory_products_kernel
        kernels = (product.__name__,)
        wide = kernels if d_in % 16 == 0 else ()
        if not routed and d_out % 16 == 0:
            wide += (select_kernel.__name__,)
        return Example(", ".join([*words, f"{d_in} → {d_out}"]), call, kernels, wide)

    return [
        example("bf16", 1, 512, 1),
        example("bf16", 1, 512, 2),
        example("bf16", 1, 512, 2, gate="silu"),
        example("bf16", 1, 512, 2, layout="Conv1D"),
        example("bf16", 1, 512, 8),
        example("fp16", 1, 128, 2, activation="gelu_tanh"),
        example("bf16", 3, 20, 2),
        example("bf16", 3, 20, 2, gate="silu"),
        example("bf16", 3, 20, 8, activation=None),
        example("bf16", 3, 20, 8, gate="gelu_tanh", activation="gelu_tanh"),
        example("fp32", 1, 512, 2),
        example("fp32", 1, 512, 8, gate="silu"),
        example("bf16", 7, 41, 2, d_in=14335, d_out=4095),
        example("bf16", 8, 64, 2, routed=True),
        example("bf16", 8, 64, 2, routed=True, gate="silu"),
        example("bf16", 8, 64, 2, routed=True, layout="Conv1D"),
        example("fp16", 2, 64, 2, routed=True),
        example("bf16", 3, 20, 8, routed=True),
        example("bf16", 3, 20, 2, routed=True, gate="silu"),
        example("fp32", 8, 64, 2, routed=True, gate="gelu"),
        example("bf16", 7, 41, 2, routed=True, d_in=14335, d_out=4095),
    ]
