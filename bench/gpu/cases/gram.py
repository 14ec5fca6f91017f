"""``gram``: ``K Kᵀ + ridge · I``."""

from __future__ import annotations

import torch

from bench.gpu.case import DTYPES, Case, Form, Inputs, Outputs, normal

RIDGE = 1.0

PARTS = {"bf16": 1, "fp16": 1, "fp32": 6}
"""Products of 16-bit parts that a product of that accuracy takes on the tensor cores."""


def run(inputs: Inputs) -> Outputs:
    """Call the op."""
    from pyeditfast.ops import gram

    return {"gram": gram(inputs["keys"], RIDGE)}


def product(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """Return the formula computed in ``dtype``."""
    keys = inputs["keys"].to(dtype)
    found = keys @ keys.mT
    found.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    return {"gram": found}


def tensor_core_product(inputs: Inputs) -> Outputs:
    """Return the formula by torch's 16-bit product with a float32 result."""
    keys = inputs["keys"]
    found = torch.bmm(keys, keys.mT, out_dtype=torch.float32)
    found.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    return {"gram": found}


def case(modules: int, n: int, d: int, dtype: str, timed: bool = False) -> Case:
    """Return the case of keys ``[modules, n, d]``."""
    plain: dict[str, Form] = {"float32 product": lambda inputs: product(inputs, torch.float32)}
    if timed and dtype != "fp32":
        plain["16-bit product to float32"] = tensor_core_product
    size = DTYPES[dtype].itemsize
    return Case(
        "gram",
        f"{dtype}, {modules} of {n} × {d}",
        lambda device, generator: {
            "keys": normal((modules, n, d), DTYPES[dtype], device, generator)
        },
        run,
        exact=lambda inputs: product(inputs, torch.float64),
        plain=plain,
        length=d,
        flops=float(PARTS[dtype] * modules * n * n * d),
        bytes=float(modules * (size * n * d + 4 * n * n)),
        memory=float(modules * n * (d * (size + 12) + n * 32)),
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [
            case(1, 20, 48, "bf16", True),
            case(2, 33, 80, "fp16"),
            case(2, 17, 600, "fp32"),
        ]
    if size == "small":
        return [
            *(case(2, n, 14336, dtype) for n in (100, 397) for dtype in DTYPES),
            case(2, 400, 14336, "bf16", True),
            case(2, 2048, 14336, "bf16", True),
        ]
    timed = [(1, 100), (2, 400), (18, 400), (1, 1024), (2, 2048), (1, 4096)]
    return [
        *(case(modules, n, 14336, "bf16", True) for modules, n in timed),
        case(2, 400, 14336, "fp32", True),
        *(
            case(modules, n, 14336, dtype)
            for modules in (2, 18)
            for n in (100, 400, 2048, 4096)
            for dtype in DTYPES
        ),
        *(case(2, n, 4096, dtype) for n in (400, 4096) for dtype in DTYPES),
        *(case(2, 397, 14335, dtype) for dtype in DTYPES),
    ]
