"""``random_mask`` and ``random_uniform``: the same bits everywhere."""

from __future__ import annotations

import torch

from bench.gpu.case import Case, Inputs, Outputs

SEED = (1 << 40) + 7
RATIO = 0.2


def run(inputs: Inputs) -> Outputs:
    """Call both ops."""
    from pyeditfast.ops import random_mask, random_uniform

    found = {"mask": random_mask(SEED, RATIO, inputs["shape"], device=inputs["device"])}
    if inputs["uniform"]:
        shape, device = inputs["shape"], inputs["device"]
        found["uniform"] = random_uniform(SEED, shape, 1 << 33, device=device)
    return found


def exact(inputs: Inputs) -> Outputs:
    """Return the reference, computed on the CPU."""
    from pyeditfast.reference.random_mask import random_mask, random_uniform

    shape, device = inputs["shape"], inputs["device"]
    found = {"mask": random_mask(SEED, RATIO, shape).to(device)}
    if inputs["uniform"]:
        found["uniform"] = random_uniform(SEED, shape, 1 << 33).to(device)
    return found


def other_numbers(inputs: Inputs) -> Outputs:
    """Return a mask of torch's own generator: other numbers, the same share."""
    return {"mask": torch.rand(inputs["shape"], device=inputs["device"]) < RATIO}


def case(shape: tuple[int, ...], uniform: bool, timed: bool = False) -> Case:
    """Return the case of a mask of ``shape``."""
    count = 1
    for length in shape:
        count *= length
    return Case(
        "random_mask",
        " × ".join(str(length) for length in shape),
        lambda device, generator: {"shape": shape, "device": device, "uniform": uniform},
        run,
        exact=exact,
        plain={"torch.rand < ratio": other_numbers} if timed else {},
        equal=True,
        bytes=float(count),
        memory=64.0 * count,
        checked=not timed,
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [case((7, 33), True), case((5, 16), False, timed=True)]
    checks = [case((1000, 1023), True), case((17,), True)]
    return [*checks, case((4096, 14336), False, timed=True)]
