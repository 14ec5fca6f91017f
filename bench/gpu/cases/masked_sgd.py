"""``masked_sgd_`` and ``masked_sgd_product_``: a side memory's step, alone or with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.gpu.case import DTYPES, Case, Inputs, Outputs, normal, terms

SEED = 5
RATIO = 0.2
LR = 1.0
DECAY = 1e-5
CONSTRAINT = 0.01
"""Smaller than WISE's 1.0, so that the clamp has something to do."""


def step(inputs: Inputs) -> dict[str, Any]:
    """Return the numbers of the step."""
    return {
        "seed": SEED,
        "ratio": RATIO,
        "lr": LR,
        "weight_decay": DECAY,
        "norm_constraint": CONSTRAINT,
        "active": inputs.get("active"),
    }


def run(inputs: Inputs) -> Outputs:
    """Call the op."""
    from pyeditfast.ops.masked_sgd import masked_sgd_, masked_sgd_product_

    weight, main = inputs["weight"], inputs["main"]
    if "grad" in inputs:
        return {"weight": masked_sgd_(weight, inputs["grad"], main, **step(inputs))}
    rows = inputs["output_grads"], inputs["inputs"]
    return {"weight": masked_sgd_product_(weight, *rows, main, **step(inputs))}


def exact(inputs: Inputs) -> Outputs:
    """Return the formula in float64, not rounded."""
    from pyeditfast.reference.masked_sgd import masked_sgd_

    weight, main = inputs["weight"].double(), inputs["main"].double()
    return {"weight": masked_sgd_(weight, gradient(inputs, torch.float64), main, **step(inputs))}


def gradient(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Return the gradient in ``dtype``."""
    if "grad" in inputs:
        return inputs["grad"].to(dtype)
    return inputs["output_grads"].to(dtype).T @ inputs["inputs"].to(dtype)


def by_float32(inputs: Inputs) -> Outputs:
    """Return the formula in float32, rounded once: the yardstick of the error."""
    from pyeditfast.reference.masked_sgd import masked_sgd_

    grad = gradient(inputs, torch.float32)
    return {"weight": masked_sgd_(inputs["weight"], grad, inputs["main"], **step(inputs))}


def plain(inputs: Inputs) -> Outputs:
    """Gradient, mask, step and clamp in the weight's dtype, with the mask at hand."""
    weight, main = inputs["weight"], inputs["main"]
    grad = gradient(inputs, weight.dtype)
    weight.add_(torch.where(inputs["mask"], grad, 0).add_(weight, alpha=DECAY), alpha=-LR)
    torch.clamp(weight, main - CONSTRAINT, main + CONSTRAINT, out=weight)
    return {"weight": weight}


def published(inputs: Inputs) -> Outputs:
    """The same with an int64 mask, an optimizer and a copy of the clamped weight, as published."""
    weight, main = inputs["weight"], inputs["main"]
    grad = gradient(inputs, weight.dtype)
    weight.grad = (grad.reshape(-1) * inputs["published_mask"]).view(weight.shape).to(weight.dtype)
    torch.optim.SGD([weight], lr=LR, weight_decay=DECAY).step()
    weight.grad = None
    clamped = torch.clamp(weight, min=main - CONSTRAINT, max=main + CONSTRAINT)
    return {"weight": weight.copy_(clamped)}


def case(
    size: tuple[int, int],
    dtype: str = "bf16",
    rows: int | None = None,
    *,
    active: bool | None = None,
    layout: str = "Linear",
    timed: bool = False,
) -> Case:
    """Return the case of a weight of ``size``; ``rows``: the gradient is a product of so many."""
    d_out, d_in = size
    kind = DTYPES[dtype]

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        shape = size if layout == "Linear" else (d_in, d_out)
        main = normal(shape, kind, device, generator, 0.02)
        weight = main + normal(shape, kind, device, generator, 0.003)
        made: Inputs = {"main": main, "weight": weight}
        if layout != "Linear":
            made = {name: value.T for name, value in made.items()}
        if rows is None:
            made["grad"] = normal(size, kind, device, generator, 0.01)
        else:
            scale = 0.1 / rows**0.25
            made["output_grads"] = normal((rows, d_out), kind, device, generator, scale)
            made["inputs"] = normal((rows, d_in), kind, device, generator, scale)
        if active is not None:
            made["active"] = torch.tensor(active, device=device)
        if timed:
            from pyeditfast.ops import random_mask

            made["mask"] = random_mask(SEED, RATIO, size, device=device)
            made["published_mask"] = made["mask"].flatten().long()
        return made

    kinds = [f"product, {rows} tokens" if rows else "step", dtype if dtype != "bf16" else ""]
    kinds += [
        layout if layout != "Linear" else "",
        f"active={active}" if active is not None else "",
    ]
    kinds += [f"{d_out} × {d_in}" if size != REAL else ""]
    bits = kind.itemsize
    moved = bits * 3 * d_out * d_in
    moved += bits * rows * (d_out + d_in) if rows else bits * d_out * d_in
    forms = {"float32": by_float32}
    return Case(
        "masked_sgd",
        ", ".join(part for part in kinds if part),
        inputs,
        run,
        exact=exact,
        plain={**forms, "dtype of the weight": plain} if timed else forms,
        published=published if timed else None,
        writes=("weight",),
        length=terms(dtype, rows or 1),
        equal=active is False,
        flops=2.0 * (rows or 0) * d_out * d_in * (6 if dtype == "fp32" else 1),
        bytes=float(moved),
        memory=200.0 * d_out * d_in,
        asynchronous=True,
        timed=timed,
    )


REAL = (4096, 14336)


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [
            case((24, 40), rows=9, timed=True),
            case((17, 33), "fp32", timed=True),
            case((24, 40), "fp16", rows=5),
            case((24, 40), active=False),
            case((24, 40), rows=5, layout="Conv1D"),
        ]
    if size == "small":
        return [case(REAL, rows=240, timed=True), case(REAL), case(REAL, "fp32", rows=100)]
    return [
        case(REAL, rows=240, timed=True),
        case(REAL, timed=True),
        *(case(REAL, dtype) for dtype in ("fp16", "fp32")),
        *(case(REAL, dtype, rows) for rows in (100, 2048) for dtype in DTYPES),
        case(REAL, rows=400, layout="Conv1D"),
        case((4095, 14335), rows=397),
        case(REAL, rows=100, active=True),
        case(REAL, rows=100, active=False),
        case(REAL, active=False),
    ]
