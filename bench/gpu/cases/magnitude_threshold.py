"""``magnitude_threshold``: the exact k-th largest magnitude."""

from __future__ import annotations

import torch

from bench.gpu.case import DTYPES, Case, Inputs, Outputs, normal

DENSITY = 0.53

PASSES = {"bf16": 1, "fp16": 1, "fp32": 3}
"""Passes over the elements that a radix select takes."""


def run(inputs: Inputs) -> Outputs:
    """Call the op."""
    from pyeditfast.ops.magnitude_threshold import magnitude_threshold

    return {"threshold": magnitude_threshold(inputs["x"], DENSITY, base=inputs["base"])}


def magnitudes(inputs: Inputs) -> torch.Tensor:
    """Return ``|x − base|`` in float32, flat."""
    x = inputs["x"].float()
    return (x if inputs["base"] is None else x - inputs["base"].float()).abs().flatten()


def by_sort(inputs: Inputs) -> Outputs:
    """Return it by a sort."""
    found = magnitudes(inputs)
    return {"threshold": found.sort(descending=True).values[int(DENSITY * found.numel()) - 1]}


def by_kthvalue(inputs: Inputs) -> Outputs:
    """Return it by torch's selection of the k-th smallest."""
    found = magnitudes(inputs)
    return {"threshold": found.kthvalue(found.numel() - int(DENSITY * found.numel()) + 1).values}


def published(inputs: Inputs) -> Outputs:
    """Return it by ``topk``, as published."""
    found = magnitudes(inputs)
    return {"threshold": found.topk(int(DENSITY * found.numel())).values[-1]}


def case(shape: tuple[int, int], dtype: str, base: bool = False, timed: bool = False) -> Case:
    """Return the case of a weight of ``shape``."""

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        x = normal(shape, DTYPES[dtype], device, generator)
        other = normal(shape, DTYPES[dtype], device, generator) if base else None
        return {"x": x, "base": other}

    count = shape[0] * shape[1]
    name = "1e8 elements" if count == 10**8 else f"{count} elements"
    size = DTYPES[dtype].itemsize
    return Case(
        "magnitude_threshold",
        f"{dtype}, {name}" + (", with base" if base else ""),
        inputs,
        run,
        exact=by_sort,
        plain={"kthvalue": by_kthvalue, "sort": by_sort},
        published=published if timed else None,
        equal=True,
        bytes=float(size * PASSES[dtype] * count * (2 if base else 1)),
        memory=48.0 * count,
        asynchronous=True,
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [
            case((27, 37), "bf16", timed=True),
            case((8, 8), "fp32", True),
            case((10, 10), "fp16"),
        ]
    large, odd = (10_000, 10_000), (1001, 999)
    if size == "small":
        return [case(large, "bf16", timed=True), case(odd, "fp32", True)]
    return [
        case(large, "bf16", timed=True),
        case(large, "fp32", timed=True),
        case((4096, 14336), "bf16", True, timed=True),
        *(case(odd, dtype, base) for dtype in DTYPES for base in (False, True)),
    ]
