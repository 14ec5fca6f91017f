"""``apply_shift_``: ``W ← round(W + Aᵀ K)`` in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.gpu.case import DTYPES, Case, Form, Inputs, Outputs, normal, terms

PARTS = {"bf16": 3, "fp32": 6}
"""By dtype of the keys, the products of bfloat16 parts that a float32 result takes."""

SEED = 17


def options(inputs: Inputs, rounding: str) -> dict[str, Any]:
    """Return the arguments that belong to a rounding."""
    if rounding == "stochastic":
        return {"seed": SEED}
    return {"remainder": inputs["remainder"]} if rounding == "compensated" else {}


def run(inputs: Inputs, rounding: str = "nearest") -> Outputs:
    """Call the op."""
    from pyeditfast.ops import Shift, apply_shift_

    left, right, weight = inputs["left"], inputs["right"], inputs["weight"]
    shift = Shift("dual", left.shape[-2], left=left, right=right)
    found = {"weight": apply_shift_(weight, shift, rounding, **options(inputs, rounding))}
    if rounding == "compensated":
        found["sum"] = weight.float() + inputs["remainder"].float()
    return found


def launch(inputs: Inputs) -> Outputs:
    """Launch the kernel without the op's checks."""
    from pyeditfast_kernels.apply_shift import apply_shift_

    weight = inputs["weight"]
    return {"weight": apply_shift_(weight, inputs["left"], inputs["right"], "nearest")}


def exact(inputs: Inputs, rounding: str = "nearest") -> Outputs:
    """Return the sum in float64, not rounded."""
    total = product(inputs, torch.float64).add_(inputs["weight"])
    return {"weight": total, "sum": total} if rounding == "compensated" else {"weight": total}


def product(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Return ``Aᵀ K`` in ``dtype``."""
    return inputs["left"].to(dtype).mT @ inputs["right"].to(dtype)


def plain(inputs: Inputs, rounding: str = "nearest") -> Outputs:
    """Add a float32 product with one rounding; what that loses goes to the remainder."""
    weight = inputs["weight"]
    total = product(inputs, torch.float32).add_(weight)
    weight.copy_(total)
    found = {"weight": weight}
    if rounding == "compensated":
        rest = (total - weight).to(weight.dtype)
        found["sum"] = weight.float() + rest.float()
    return found


def plain_baddbmm(inputs: Inputs) -> Outputs:
    """Add the product to a float32 copy of the weight."""
    total = torch.baddbmm(inputs["weight"].float(), inputs["left"].mT, inputs["right"].float())
    return {"weight": inputs["weight"].copy_(total)}


def less_exact(inputs: Inputs) -> Outputs:
    """Add a 16-bit product: the shift keeps eight bits."""
    weight = inputs["weight"]
    left, right = inputs["left"].to(weight.dtype), inputs["right"].to(weight.dtype)
    return {"weight": weight.baddbmm_(left.mT, right)}


def case(
    modules: int,
    n: int,
    size: tuple[int, int],
    weight: str = "bf16",
    right: str = "bf16",
    rounding: str = "nearest",
    layout: str = "Linear",
    timed: bool = False,
) -> Case:
    """Return the case of a shift of rank ``n`` on weights ``[modules, *size]``."""
    d_out, d_in = size

    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        shape = (modules, d_out, d_in) if layout == "Linear" else (modules, d_in, d_out)
        place = normal(shape, DTYPES[weight], device, generator, 0.02)
        inputs: Inputs = {
            "weight": place if layout == "Linear" else place.mT,
            "left": normal((modules, n, d_out), torch.float32, device, generator, 1e-2),
            "right": normal((modules, n, d_in), DTYPES[right], device, generator),
        }
        if rounding == "compensated":
            inputs["remainder"] = torch.zeros_like(inputs["weight"])
        return inputs

    kinds = [weight if right == "bf16" else f"{weight}, {right} keys"]
    kinds += [part for part in (rounding, layout) if part not in ("nearest", "Linear")]
    forms: dict[str, Form] = {"float32 product": lambda inputs: plain(inputs, rounding)}
    if timed:
        forms["float32 baddbmm"] = plain_baddbmm
    bits = DTYPES[weight].itemsize
    return Case(
        "apply_shift",
        f"{', '.join(kinds)}, {modules} of {n} → {d_out} × {d_in}",
        make,
        lambda inputs: run(inputs, rounding),
        exact=lambda inputs: exact(inputs, rounding),
        plain=forms,
        less_exact={"16-bit baddbmm": less_exact} if timed else {},
        kernel_only=launch if timed else None,
        writes=("weight", "remainder") if rounding == "compensated" else ("weight",),
        length=terms(weight, n),
        flops=2.0 * PARTS[right] * modules * n * d_out * d_in,
        bytes=float(
            modules * (2 * bits * d_out * d_in + n * (4 * d_out + DTYPES[right].itemsize * d_in))
        ),
        memory=float(modules * (48 * d_out * d_in + 24 * n * (d_out + d_in))),
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    real = (4096, 14336)
    if size == "tiny":
        return [
            case(2, 9, (24, 40), timed=True),
            case(1, 5, (17, 33), "fp16", "fp32"),
            case(1, 5, (16, 32), "fp32", "fp32", "compensated"),
            case(1, 5, (16, 32), rounding="stochastic"),
            case(1, 5, (24, 40), layout="Conv1D"),
        ]
    if size == "small":
        return [
            case(2, 400, real, timed=True),
            case(1, 4096, real, timed=True),
            case(2, 100, real, right="fp32"),
            case(1, 100, real, "fp32", "fp32"),
            case(1, 100, real, rounding="stochastic"),
            case(1, 100, real, rounding="compensated"),
        ]
    timed = [(2, 100), (2, 400), (2, 1024), (1, 4096)]
    return [
        *(case(modules, n, real, timed=True) for modules, n in timed),
        case(2, 400, real, right="fp32", timed=True),
        *(
            case(2, n, real, weight, right)
            for n in (100, 2048)
            for weight in DTYPES
            for right in ("bf16", "fp32")
        ),
        *(
            case(2, 400, real, weight, "fp32", rounding)
            for weight in DTYPES
            for rounding in ("stochastic", "compensated")
            if (weight, rounding) != ("fp32", "stochastic")
        ),
        case(2, 400, real, right="fp32", layout="Conv1D"),
        case(2, 397, (4095, 14335), right="fp32"),
        case(18, 400, (14336, 4096), right="fp32"),
    ]
