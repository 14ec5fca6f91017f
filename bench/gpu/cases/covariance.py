"""``covariance``: ``C ← C + Kᵀ K``."""

from __future__ import annotations

import torch

from bench.gpu.case import DTYPES, Case, Form, Inputs, Outputs, normal
from bench.gpu.cases.gram import PARTS


def run(inputs: Inputs) -> Outputs:
    """Call the op."""
    from pyeditfast.ops import covariance

    return {"covariance": covariance(inputs["keys"], inputs["out"])}


def product(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """Return the formula computed in ``dtype``, in place for float32."""
    keys = inputs["keys"].to(dtype)
    return {"covariance": inputs["out"].to(dtype).baddbmm_(keys.mT, keys)}


def tensor_core_product(inputs: Inputs) -> Outputs:
    """Return the formula by torch's 16-bit product with a float32 result."""
    keys = inputs["keys"]
    found = torch.bmm(keys.mT, keys, out_dtype=torch.float32)
    return {"covariance": inputs["out"].add_(found)}


def case(modules: int, n: int, d: int, dtype: str, timed: bool = False) -> Case:
    """Return the case of keys ``[modules, n, d]``."""
    plain: dict[str, Form] = {"float32 product": lambda inputs: product(inputs, torch.float32)}
    if timed and dtype != "fp32":
        plain["16-bit product to float32"] = tensor_core_product
    size = DTYPES[dtype].itemsize
    return Case(
        "covariance",
        f"{dtype}, {modules} of {n} × {d}",
        lambda device, generator: {
            "keys": normal((modules, n, d), DTYPES[dtype], device, generator),
            "out": torch.full((modules, d, d), 0.5, device=device),
        },
        run,
        exact=lambda inputs: product(inputs, torch.float64),
        plain=plain,
        writes=("out",),
        length=n + 1,
        flops=float(PARTS[dtype] * modules * n * d * d),
        bytes=float(modules * (size * n * d + 6 * d * d)),
        memory=float(modules * d * (n * (size + 12) + 24 * d) + 16 * d * d),
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size; eighteen of 14336 pass 2³¹ elements."""
    if size == "tiny":
        return [
            case(1, 9, 48, "bf16", True),
            case(2, 20, 70, "fp16"),
            case(2, 37, 33, "fp32"),
        ]
    if size == "small":
        return [
            *(case(2, n, 4096, dtype) for n in (100, 2048) for dtype in DTYPES),
            case(2, 400, 4096, "bf16", True),
        ]
    return [
        case(2, 400, 4096, "bf16", True),
        case(2, 4096, 4096, "bf16", True),
        case(1, 4096, 14336, "bf16", True),
        *(
            case(modules, n, 4096, dtype)
            for modules in (2, 18)
            for n in (100, 2048)
            for dtype in DTYPES
        ),
        case(2, 400, 14336, "fp32"),
        case(2, 397, 4095, "bf16"),
        case(18, 100, 14336, "bf16"),
    ]
