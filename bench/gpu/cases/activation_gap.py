"""``activation_gap``: how far side memories are from the main memory, for every query."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from bench.gpu.case import DTYPES, Case, Inputs, Outputs, terms
from bench.gpu.cases.memories import make, plain_gaps, plain_outputs, products, widened


def run(inputs: Inputs, activation: str | None) -> Outputs:
    """Call the op."""
    from pyeditfast.ops.activation_gap import activation_gap

    found = activation_gap(
        inputs["x"],
        inputs["main"],
        inputs["sides"],
        bias=inputs["bias"],
        activation=activation,
        mask=inputs["mask"],
    )
    return {"gaps": found}


def exact(inputs: Inputs, activation: str | None) -> Outputs:
    """Return the reference in float64."""
    from pyeditfast.reference.activation_gap import activation_gap

    memories = widened(inputs)
    found = activation_gap(
        inputs["x"].double(),
        memories["main"],
        memories["sides"],
        bias=memories["bias"],
        activation=activation,
        mask=inputs["mask"],
    )
    return {"gaps": found}


def plain(inputs: Inputs, activation: str | None) -> Outputs:
    """Return the gaps of the outputs of torch."""
    return {"gaps": plain_gaps(plain_outputs(inputs, inputs["x"]), activation, inputs["mask"])}


def published(inputs: Inputs, activation: str | None) -> Outputs:
    """Decide a memory at a time, each gap on the host, as published."""
    from pyeditfast.reference.activation_gap import ACTIVATIONS

    act = ACTIVATIONS[activation]
    gaps = []
    for side in inputs["sides"]:
        centre = linear(inputs["x"], inputs["main"], inputs["bias"])
        output = linear(inputs["x"], side, inputs["bias"])
        gaps.append((act(output) - act(centre)).norm(dim=-1).mean(-1).mean().item())
    return {"gaps": torch.tensor(gaps)}


def case(
    shape: tuple[int, int, int, int],
    memories: int,
    dtype: str = "bf16",
    activation: str | None = "silu",
    *,
    masked: bool = False,
    bias: bool = False,
    timed: bool = False,
) -> Case:
    """Return the case of queries ``[batch, tokens]`` and ``memories`` side memories."""
    batch, tokens, d_in, d_out = shape
    kinds = [dtype] if dtype != "bf16" else []
    kinds += [f"{batch} × {tokens} tokens", f"{memories} memories", str(activation)]
    kinds += ["masked"] * masked + ["bias"] * bias
    size = DTYPES[dtype].itemsize
    multiplications = batch * tokens * d_in * d_out
    return Case(
        "activation_gap",
        f"{', '.join(kinds)}, {d_in} → {d_out}",
        lambda device, generator: make(
            shape, memories, dtype, device, generator, masked=masked, bias=bias
        ),
        lambda inputs: run(inputs, activation),
        exact=lambda inputs: exact(inputs, activation),
        plain={"torch": lambda inputs: plain(inputs, activation)},
        bare=products if timed else None,
        published=(lambda inputs: published(inputs, activation)) if timed else None,
        length=terms(dtype, d_in),
        flops=2.0 * (1 + memories) * multiplications,
        unit="fp32" if dtype == "fp32" else "bf16",
        bytes=float(size * (batch * tokens * d_in + (1 + memories) * d_in * d_out)),
        memory=float((1 + memories) * d_in * d_out * 32 + batch * tokens * (d_in + 9 * d_out) * 32),
        # It takes single tokens.
        without=() if tokens == 1 else ("cuda",),
        asynchronous=True,
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [
            case((3, 5, 48, 24), 2, timed=True),
            case((2, 1, 40, 33), 1, "fp16", None),
            case((5, 1, 33, 17), 2, "fp32", "gelu", bias=True),
            case((4, 7, 33, 17), 3, "fp32", "gelu", masked=True, bias=True),
        ]
    down = (14336, 4096)
    if size == "small":
        return [
            case((8, 64, *down), 2, timed=True),
            case((3, 17, *down), 1, "fp32"),
            case((16, 1, *down), 2),
        ]
    return [
        case((1, 512, *down), 2, timed=True),
        case((8, 64, *down), 2, timed=True),
        case((16, 1, *down), 2, timed=True),
        *(case((7, 1, *down), 2, dtype, "gelu_tanh", bias=True) for dtype in DTYPES),
        case((16, 1, *down), 8, masked=True),
        case((3, 1, 4095, 4097), 2, activation="relu"),
        *(case((6, 50, *down), 2, dtype, "gelu") for dtype in DTYPES),
        case((9, 120, *down), 8, masked=True, bias=True),
        case((5, 33, *down), 1, activation="gelu_tanh"),
        case((5, 33, *down), 3, activation="relu"),
        case((7, 41, 4095, 4097), 2, activation=None),
    ]
