"""Decoding with side memories: one token a row, each row answered by the memory of its route; and
the activation gaps of such tokens.

``x`` ``[batch, 1, d_in]``; main and up to eight sides ``[d_out, d_in]``, of the dtype of ``x``
(bf16, fp16, float32) and any strides; ``route`` ``[batch]`` int64, a side's number, else the main
memory:

    output[b] = W_route(b) x_b + bias
    gaps[b, m] = ‖ act(W_m x_b + bias) − act(W x_b + bias) ‖₂

with ``act(gate) · x`` in place of ``x`` where there is a gate (see ``decode_product``).

Floor of ``routed_decode``: ``d_out d_in`` elements of every memory in use are read; of
``decode_gap``: those of all memories. The FLOPs of 16 rows, 32 an element, are on the tensor cores;
an H200's do ten times as many while it reads a bf16 element (float32: see ``tile_product``).

Expected: the copy bandwidth, less the filling of each program's pipeline and the launch of the
second kernel: a tenth or two of the time for one 4096 × 14336 memory in bf16. Beside the memories
there are reads of 16 rows of ``x`` from the L2 cache, for ``routed_decode`` a quarter of the bytes
of one memory, and ``8 · splits · batch · d_out`` bytes of parts, 2 %. No GPU has measured it yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyeditfast_kernels.activations import activate, activation_name
from pyeditfast_kernels.decode_configs import CANDIDATES
from pyeditfast_kernels.decode_product import decode_product, decode_product_kernel, rounded
from pyeditfast_kernels.launch import Config, Example, interprets, launch
from pyeditfast_kernels.tuned import Tunable

REDUCE = Config(
    "512 outputs",
    {"BLOCK_OUT": 512},
    num_warps=4,
    num_stages=1,
    why="16 bytes a thread, and at 16 rows of 4096 a program for every multiprocessor",
)
GAP = Config(
    "2048 outputs",
    {"BLOCK_OUT": 2048},
    num_warps=8,
    num_stages=1,
    why="a program a gap, so that no third kernel is needed; two loads of 16 bytes a thread",
)


@triton.jit(do_not_specialize=["batch", "splits"])
def routed_decode_reduce_kernel(
    partial,
    bias,
    output,
    batch,
    d_out,
    splits,
    bias_stride,
    INTERPRETED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Add the parts ``[splits, batch, d_out]`` of all splits, then the bias."""
    blocks = tl.cdiv(d_out, BLOCK_OUT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    outs = tl.program_id(0) % blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)  # [BLOCK_OUT]
    inside = outs < d_out
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    for split in range(0, splits):
        total += tl.load(partial + (split * batch + row) * d_out + outs, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + outs.to(tl.int64) * bias_stride, mask=inside, other=0.0).to(
            tl.float32
        )
    total = rounded(total, output.dtype.element_ty, INTERPRETED)
    tl.store(output + row * d_out + outs, total, mask=inside)


@triton.jit(do_not_specialize=["batch", "memories", "splits"])
def decode_gap_kernel(
    partial,
    bias,
    gaps,
    batch,
    memories,
    d_out,
    splits,
    bias_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Write ``gaps`` ``[batch, memories]`` from the parts ``[1 + memories, splits, batch, d_out]``,
    main memory first.
    """
    row = (tl.program_id(0) // memories).to(tl.int64)
    memory = tl.program_id(0) % memories + 1
    size = tl.cast(batch, tl.int64) * d_out
    squares = tl.zeros((BLOCK_OUT,), tl.float32)
    for start in range(0, d_out, BLOCK_OUT):
        outs = start + tl.arange(0, BLOCK_OUT)  # [BLOCK_OUT]
        inside = outs < d_out
        main_sum = tl.zeros((BLOCK_OUT,), tl.float32)
        side_sum = tl.zeros((BLOCK_OUT,), tl.float32)
        for split in range(0, splits):
            place = partial + split * size + row * d_out + outs
            main_sum += tl.load(place, mask=inside, other=0.0)
            side_sum += tl.load(place + memory * splits * size, mask=inside, other=0.0)
        if bias is not None:
            offset = tl.load(bias + outs.to(tl.int64) * bias_stride, mask=inside, other=0.0).to(
                tl.float32
            )
            main_sum += offset
            side_sum += offset
        difference = activate(side_sum, ACTIVATION) - activate(main_sum, ACTIVATION)
        squares += difference * difference
    tl.store(gaps + row * memories + memory - 1, tl.sqrt(tl.sum(squares, 0)))


def routed_decode(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    route: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_activation: str | None,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return every row of ``x`` ``[batch, 1, d_in]`` times the memory of its ``route``.

    ``config`` and ``splits`` are those of ``choose_config`` and ``choose_splits`` unless given.
    """
    batch, d_out = x.shape[0], main.shape[0]
    output = torch.empty((batch, 1, d_out), dtype=x.dtype, device=x.device)
    partial, splits = decode_product(
        x, main, sides, route, bias, gate, gate_activation, output, config, splits
    )
    if partial is not None:
        launch(
            routed_decode_reduce_kernel,
            (batch * triton.cdiv(d_out, REDUCE.sizes["BLOCK_OUT"]),),
            REDUCE,
            partial=partial,
            bias=bias,
            output=output,
            batch=batch,
            d_out=d_out,
            splits=splits,
            bias_stride=0 if bias is None else bias.stride(0),
            INTERPRETED=interprets(),
        )
    return output


def decode_gap(
    x: Tensor,
    main: Tensor,
    sides: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return the gaps ``[batch, memories]``, float32, of ``x`` ``[batch, 1, d_in]``."""
    batch = x.shape[0]
    gaps = torch.empty((batch, len(sides)), dtype=torch.float32, device=x.device)
    if gaps.numel() == 0:
        return gaps
    partial, splits = decode_product(x, main, sides, None, None, None, None, None, config, splits)
    launch(
        decode_gap_kernel,
        (batch * len(sides),),
        GAP,
        partial=partial,
        bias=bias,
        gaps=gaps,
        batch=batch,
        memories=len(sides),
        d_out=main.shape[0],
        splits=splits,
        bias_stride=0 if bias is None else bias.stride(0),
        ACTIVATION=activation_name(activation),
    )
    return gaps


def examples() -> list[Example]:
    """Return the calls that are compiled ahead of time."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def memories(
        dtype: str, d_out: int, d_in: int, sides: int, layout: str
    ) -> tuple[Tensor, list[Tensor]]:
        shape = (d_out, d_in) if layout == "Linear" else (d_in, d_out)
        main = torch.empty(shape, dtype=dtypes[dtype], device="meta")
        main = main if layout == "Linear" else main.mT
        return main, [main] * sides

    def decode(
        dtype: str,
        d_out: int,
        d_in: int,
        sides: int = 2,
        layout: str = "Linear",
        has_bias: bool = False,
        gate_activation: str | None = None,
    ) -> Example:
        def call() -> None:
            x = torch.empty(16, 1, d_in, dtype=dtypes[dtype], device="meta")
            main, others = memories(dtype, d_out, d_in, sides, layout)
            route = torch.empty(16, dtype=torch.int64, device="meta")
            bias = x.new_empty(d_out) if has_bias else None
            gate = x if gate_activation else None
            routed_decode(x, main, others, route, bias, gate, gate_activation)

        name = f"{layout} {d_out} × {d_in}, {dtype}, {sides} sides"
        name += ", bias" if has_bias else ""
        name += f", {gate_activation} gate" if gate_activation else ""
        return example(name, call, d_out, d_in)

    def gap(dtype: str, d_out: int, d_in: int, activation: str | None) -> Example:
        def call() -> None:
            x = torch.empty(16, 1, d_in, dtype=dtypes[dtype], device="meta")
            main, others = memories(dtype, d_out, d_in, 2, "Linear")
            decode_gap(x, main, others, None, activation)

        name = f"gaps {d_out} × {d_in}, {dtype}, 2 sides, {activation_name(activation)}"
        return example(name, call, d_out, d_in)

    def example(name: str, call: Callable[[], None], d_out: int, d_in: int) -> Example:
        kernels = (
            decode_product_kernel.__name__,
            routed_decode_reduce_kernel.__name__,
            decode_gap_kernel.__name__,
        )
        return Example(name, call, kernels[:1], kernels if d_out % 16 == d_in % 16 == 0 else ())

    return [
        decode("bf16", 4096, 14336),
        decode("fp16", 4096, 14336),
        decode("fp32", 4096, 14336),
        decode("bf16", 4096, 14336, sides=8),
        decode("bf16", 4096, 14336, sides=1, gate_activation="silu"),
        decode("bf16", 4096, 14336, sides=8, has_bias=True, gate_activation="gelu"),
        decode("fp32", 4096, 14336, sides=8, has_bias=True, gate_activation="gelu"),
        decode("bf16", 768, 3072, sides=1, layout="Conv1D", has_bias=True),
        decode("fp32", 768, 3072, sides=1, layout="Conv1D", has_bias=True),
        decode("bf16", 4095, 14335),
        decode("fp32", 4095, 14335, gate_activation="gelu"),
        decode("bf16", 256, 512, sides=1, has_bias=True),
        gap("bf16", 4096, 14336, "silu"),
        gap("fp32", 4096, 14336, None),
    ]


def tunable() -> list[Tunable]:
    """Return what ``make tune`` chooses between."""

    def choice(layout: str) -> Tunable:
        name = f"bfloat16, {layout}"

        def inputs(device: torch.device, tiny: bool) -> tuple[Tensor, ...]:
            d_out, d_in = (80, 144) if tiny else (4096, 14336)
            x = torch.randn(16, 1, d_in, device=device).bfloat16()
            shape = (d_out, d_in) if layout == "Linear" else (d_in, d_out)
            memories = [torch.randn(shape, device=device).bfloat16() for _ in range(2)]
            main, side = memories if layout == "Linear" else (memory.mT for memory in memories)
            return x, main, side, torch.arange(16, device=device) % 2 - 1

        def call(inputs: tuple[Tensor, ...], config: Config) -> Tensor:
            x, main, side, route = inputs
            return routed_decode(x, main, [side], route, None, None, None, config)

        def exact(inputs: tuple[Tensor, ...]) -> Tensor:
            x, main, side, route = inputs
            wide = x.double()
            outputs = [wide @ memory.double().mT for memory in (main, side)]
            return torch.where((route == 0)[:, None, None], outputs[1], outputs[0])

        return Tunable("routed_decode", name, CANDIDATES[name], inputs, call, exact)

    return [choice("Linear"), choice("Conv1D")]
