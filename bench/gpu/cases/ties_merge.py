"""``ties_merge``: shards into one side memory.

The truth is the reference in float32, which is how the op is defined: where the signs of shards
cancel, another precision may elect another sign. Two and four shards, whose weights are exact,
leave no such doubt. The op runs as ``auto`` will: it calls ``magnitude_threshold``, which need not
have the same backends.
"""

from __future__ import annotations

import torch

from bench.gpu.case import AUTO, DTYPES, Case, Inputs, Outputs, normal

DENSITY = 0.53


def run(inputs: Inputs) -> Outputs:
    """Call the op."""
    from pyeditfast.ops.ties_merge import ties_merge

    return {"merged": ties_merge(inputs["main"], inputs["sides"], DENSITY)}


def exact(inputs: Inputs) -> Outputs:
    """Return the reference, as float64."""
    return {"merged": plain(inputs)["merged"].double()}


def plain(inputs: Inputs) -> Outputs:
    """Return the reference."""
    from pyeditfast.reference.ties_merge import ties_merge

    return {"merged": ties_merge(inputs["main"], inputs["sides"], DENSITY)}


def published(inputs: Inputs) -> Outputs:
    """Return the merge by ``topk``, as published."""
    from pyeditfast_published.ties_merge import published_ties

    return {"merged": published_ties(inputs["main"], inputs["sides"], DENSITY)}


def case(size: tuple[int, int], shards: int, dtype: str, timed: bool = False) -> Case:
    """Return the case of ``shards`` shards of a weight."""

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        main = normal(size, DTYPES[dtype], device, generator, 0.02)
        sides = []
        for _ in range(shards):
            change = normal(size, torch.float32, device, generator, 0.01)
            mask = torch.rand(size, device=device, generator=generator) < 0.2
            sides.append((main.float() + change * mask).to(main.dtype))
        return {"main": main, "sides": sides}

    count = size[0] * size[1]
    bits = DTYPES[dtype].itemsize
    passes = 1 if bits == 2 else 3
    return Case(
        "ties_merge",
        f"{dtype}, {shards} shards of {size[0]} × {size[1]}",
        inputs,
        run,
        exact=exact,
        plain={"reference": plain},
        published=published if timed else None,
        backends=(AUTO, "torch"),
        bytes=float(bits * count * (shards + 2 + 2 * passes * shards)),
        memory=float(count * (60 + 20 * shards)),
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [
            case((24, 40), 2, "bf16", timed=True),
            case((17, 33), 4, "fp32"),
            case((9, 16), 2, "fp16"),
        ]
    real = (4096, 14336)
    if size == "small":
        return [case(real, 2, "bf16", timed=True)]
    return [
        case(real, 2, "bf16", timed=True),
        case(real, 4, "bf16"),
        case(real, 2, "fp16"),
        case(real, 4, "fp32"),
        case((4095, 14335), 2, "bf16"),
    ]
