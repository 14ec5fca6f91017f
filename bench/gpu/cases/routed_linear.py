"""``routed_linear``: every query answered by its memory; prefill, decode and the routed FFN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from bench.gpu.case import DTYPES, Case, Inputs, Outputs, normal, terms
from bench.gpu.cases.memories import make, plain_gaps, plain_outputs, products, widened

DOWN = (14336, 4096)


def run(inputs: Inputs) -> Outputs:
    """Call the op."""
    from pyeditfast.ops.routed_linear import routed_linear

    found = routed_linear(
        inputs["x"],
        inputs["main"],
        inputs["sides"],
        inputs["thresholds"],
        bias=inputs["bias"],
        activation=None if inputs.get("gate") is None else "silu",
        mask=inputs["mask"],
        route=inputs.get("route"),
        gate=inputs.get("gate"),
    )
    return outputs_of(found.output, found.route, found.gaps, inputs["mask"])


def outputs_of(output: Tensor, route: Tensor, gaps: Tensor | None, mask: Tensor | None) -> Outputs:
    """Return what is compared: of masked tokens, which may hold NaN, nothing."""
    if mask is not None:
        output = output.masked_fill(~mask[..., None], 0.0)
    found = {"output": output, "route": route}
    return found if gaps is None else {**found, "gaps": gaps}


def exact(inputs: Inputs) -> Outputs:
    """Return the reference in float64."""
    from pyeditfast.reference.routed_linear import routed_linear

    memories = widened(inputs)
    gate = inputs.get("gate")
    found = routed_linear(
        inputs["x"].double(),
        memories["main"],
        memories["sides"],
        inputs["thresholds"].double(),
        bias=memories["bias"],
        activation=None if gate is None else "silu",
        mask=inputs["mask"],
        route=inputs.get("route"),
        gate=None if gate is None else gate.double(),
    )
    return outputs_of(found.output, found.route, found.gaps, inputs["mask"])


def plain(inputs: Inputs) -> Outputs:
    """Return what torch computes: all outputs, gaps, and a selection, on the device."""
    from pyeditfast.reference.choose_route import choose_route

    x, gate, route, gaps = inputs["x"], inputs.get("gate"), inputs.get("route"), None
    if gate is not None:
        x = silu(gate) * x
    found = plain_outputs(inputs, x)
    if route is None:
        gaps = plain_gaps(found, None if gate is None else "silu", inputs["mask"])
        route = choose_route(gaps, inputs["thresholds"])
    output = found[0]
    for number, other in enumerate(found[1:]):
        output = torch.where((route == number)[:, None, None], other, output)
    return outputs_of(output, route, gaps, inputs["mask"])


def plain_decode(inputs: Inputs) -> Outputs:
    """Return the outputs memory by memory, with the rows of each known to the host beforehand."""
    x, gate = inputs["x"], inputs.get("gate")
    if gate is not None:
        x = silu(gate) * x
    output = x.new_empty(*x.shape[:2], inputs["main"].shape[0])
    for number, rows in inputs["rows_of"]:
        memory = inputs["main"] if number < 0 else inputs["sides"][number]
        output[rows] = linear(x[rows], memory, inputs["bias"])
    return {"output": output, "route": inputs["route"]}


def published(inputs: Inputs) -> Outputs:
    """Decide on the host, one memory for all queries of the call, as published."""
    x, main = inputs["x"], inputs["main"]
    output = original = linear(x, main)
    largest, route = 0.0, -1
    for number, side in enumerate(inputs["sides"]):
        candidate = linear(x, side)
        gap = (candidate - original).norm(dim=-1).mean(-1).mean().item()
        if gap > largest and gap > float(inputs["thresholds"][number]):
            output, largest, route = candidate, gap, number
    return {"output": output, "route": torch.tensor(route)}


def prefill(
    shape: tuple[int, int, int, int],
    memories: int,
    dtype: str = "bf16",
    *,
    masked: bool = False,
    bias: bool = False,
    gated: bool = False,
    routed: bool = False,
    timed: bool = False,
) -> Case:
    """Return the case of whole prompts; ``routed``: with a route, ``gated``: the routed FFN."""
    batch, tokens, d_in, d_out = shape

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        made = make(shape, memories, dtype, device, generator, masked=masked, bias=bias)
        if gated:
            gate = normal((batch, tokens, d_in), DTYPES[dtype], device, generator)
            # Where the gate is closed no memory differs from another.
            made["gate"] = gate.abs_().add_(0.5)
        if routed:
            made["route"] = made["owner"]
        return made

    kinds = ["FFN" if gated else "prefill", f"{batch} × {tokens} tokens", f"{memories} memories"]
    kinds += ["route given"] * routed + ["masked"] * masked + ["bias"] * bias
    kinds += [dtype] if dtype != "bf16" else []
    kinds += [f"{d_in} → {d_out}"] if (d_in, d_out) != DOWN else []
    size = DTYPES[dtype].itemsize
    used = 1 if routed else 1 + memories
    rows = batch * tokens
    return Case(
        "routed_linear",
        ", ".join(kinds),
        inputs,
        run,
        exact=exact,
        plain={"torch": plain},
        published=published if timed and not (gated or routed) else None,
        bare=products if timed else None,
        length=terms(dtype, d_in),
        flops=2.0 * used * rows * d_in * d_out,
        unit="fp32" if dtype == "fp32" else "bf16",
        bytes=float(size * (rows * (d_in * (1 + gated) + d_out) + used * d_in * d_out)),
        memory=float((1 + memories) * d_in * d_out * 32 + rows * (d_in + 9 * d_out) * 40),
        without=("cuda",),
        asynchronous=True,
        timed=timed,
    )


def decode(
    batch: int,
    d: tuple[int, int],
    memories: int,
    in_use: int,
    dtype: str = "bf16",
    *,
    bias: bool = False,
    gated: bool = False,
    timed: bool = False,
) -> Case:
    """Return the case of one token a row with a route; rows use ``in_use`` memories."""
    d_in, d_out = d

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        made = make((batch, 1, d_in, d_out), memories, dtype, device, generator, bias=bias)
        if gated:
            made["gate"] = normal((batch, 1, d_in), DTYPES[dtype], device, generator)
        route = [(row * in_use) // batch for row in range(batch)]
        # The last one in use is the main memory, where there are several.
        route = [-1 if in_use > 1 and number == in_use - 1 else number for number in route]
        made["route"] = torch.tensor(route, device=device)
        made["rows_of"] = [
            (number, slice(route.index(number), route.index(number) + route.count(number)))
            for number in dict.fromkeys(route)
        ]
        return made

    words = {1: "one memory", 2: "two memories", 3: "three memories"}
    kinds = ["decode", f"{batch} rows", f"{words[in_use]} in use"]
    kinds += ["bias"] * bias + ["gate"] * gated
    kinds += [dtype] if dtype != "bf16" else []
    kinds += [f"{d_in} → {d_out}"] if d != DOWN else []
    size = DTYPES[dtype].itemsize
    return Case(
        "routed_linear",
        ", ".join(kinds),
        inputs,
        run,
        exact=exact,
        plain={"torch, rows known": plain_decode, "torch, all memories": plain},
        length=terms(dtype, d_in),
        flops=2.0 * batch * d_in * d_out,
        unit="fp32" if dtype == "fp32" else "bf16",
        bytes=float(size * (batch * (d_in * (1 + gated) + d_out) + in_use * d_in * d_out)),
        memory=float((1 + memories) * d_in * d_out * 32),
        asynchronous=True,
        timed=timed,
    )


def first_token(
    batch: int,
    d: tuple[int, int],
    memories: int,
    dtype: str = "bf16",
    *,
    masked: bool = False,
    timed: bool = False,
) -> Case:
    """Return the case of one token a row whose gaps choose the memory."""
    d_in, d_out = d
    kinds = ["one token", f"{batch} rows", f"{memories} memories", *["masked"] * masked]
    kinds += [dtype] if dtype != "bf16" else []
    kinds += [f"{d_in} → {d_out}"] if d != DOWN else []
    return Case(
        "routed_linear",
        ", ".join(kinds),
        lambda device, generator: make(
            (batch, 1, d_in, d_out), memories, dtype, device, generator, masked=masked
        ),
        run,
        exact=exact,
        plain={"torch": plain},
        length=terms(dtype, d_in),
        flops=2.0 * (1 + memories) * batch * d_in * d_out,
        unit="fp32" if dtype == "fp32" else "bf16",
        bytes=float(
            DTYPES[dtype].itemsize * (batch * (d_in + d_out) + (1 + memories) * d_in * d_out)
        ),
        memory=float((1 + memories) * d_in * d_out * 32),
        asynchronous=True,
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [
            prefill((3, 5, 48, 24), 2, timed=True),
            prefill((4, 7, 33, 17), 3, "fp32", masked=True, bias=True),
            prefill((3, 4, 48, 24), 2, gated=True),
            prefill((3, 4, 48, 24), 2, "fp16", routed=True),
            decode(4, (48, 24), 2, 3, timed=True),
            decode(9, (33, 17), 2, 2, "fp32", bias=True, gated=True),
            first_token(5, (48, 24), 2),
        ]
    if size == "small":
        return [
            prefill((1, 512, *DOWN), 2, timed=True),
            decode(16, DOWN, 2, 3, timed=True),
            first_token(4, DOWN, 2, "fp16"),
            prefill((4, 33, *DOWN), 2, "fp32", masked=True),
            prefill((4, 33, *DOWN), 2, gated=True),
        ]
    return [
        prefill((1, 512, *DOWN), 2, timed=True),
        prefill((8, 64, *DOWN), 2, timed=True),
        prefill((8, 64, *DOWN), 2, gated=True, timed=True),
        prefill((8, 64, *DOWN), 2, routed=True, timed=True),
        decode(16, DOWN, 2, 1, timed=True),
        decode(16, DOWN, 2, 3, timed=True),
        decode(1, DOWN, 2, 1, timed=True),
        decode(8, DOWN, 2, 1, timed=True),
        first_token(1, DOWN, 2, timed=True),
        first_token(16, DOWN, 8, masked=True),
        *(prefill((6, 50, *DOWN), 2, dtype) for dtype in DTYPES),
        prefill((9, 120, *DOWN), 8, masked=True, bias=True),
        prefill((5, 33, *DOWN), 1),
        prefill((7, 41, 4095, 4097), 3),
        prefill((6, 50, *DOWN), 2, "fp16", gated=True),
        *(decode(batch, DOWN, 8, 3, dtype) for batch in (3, 16) for dtype in DTYPES),
        *(decode(16, DOWN, 2, 3, dtype, bias=True, gated=True) for dtype in DTYPES),
        *(first_token(5, DOWN, 2, dtype) for dtype in DTYPES),
        decode(16, (4095, 4097), 2, 3),
    ]
