"""``cholesky_solve``: ``G⁻¹ B`` for the Gram matrices of a turn."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.gpu.case import Case, Inputs, Outputs, normal

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def make(
    modules: int,
    n: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    """Return a Gram matrix of ``4 n`` random features and a right-hand side."""
    keys = normal((modules, n, 4 * n), dtype, device, generator)
    gram = keys @ keys.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return {"gram": gram, "rhs": normal((modules, n, columns), dtype, device, generator)}


def run(inputs: Inputs) -> Outputs:
    """Call the op."""
    from pyeditfast.ops import cholesky_solve

    return {"solution": cholesky_solve(inputs["gram"], inputs["rhs"])}


def exact(inputs: Inputs) -> Outputs:
    """Return the solution by LU in float64."""
    return {"solution": torch.linalg.solve(inputs["gram"].double(), inputs["rhs"].double())}


def by_library(inputs: Inputs) -> Outputs:
    """Return the solution by torch's Cholesky, without a look at its success."""
    factor, _ = torch.linalg.cholesky_ex(inputs["gram"])
    return {"solution": torch.cholesky_solve(inputs["rhs"], factor)}


def case(modules: int, n: int, columns: int, dtype: str = "fp32", timed: bool = False) -> Case:
    """Return the case of ``modules`` systems of size ``n``."""
    size = DTYPES[dtype].itemsize
    return Case(
        "cholesky_solve",
        f"{modules} of {n}, {columns} columns" + ("" if dtype == "fp32" else f", {dtype}"),
        lambda device, generator: make(modules, n, columns, DTYPES[dtype], device, generator),
        run,
        exact=exact,
        plain={"cholesky_ex and cholesky_solve": by_library},
        length=n,
        flops=float(modules * (n**3 / 3 + 2 * n * n * columns)),
        unit=dtype,
        bytes=float(size * modules * (n * n / 2 + 2 * n * columns)),
        memory=float(size // 4 * modules * n * (16 * n + 36 * n + 40 * columns)),
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [
            case(1, 1, 1),
            case(2, 13, 7, timed=True),
            case(3, 40, 5),
            case(2, 70, 17, "fp64", timed=True),
        ]
    if size == "small":
        return [
            case(2, 100, 4096),
            case(2, 400, 4096, timed=True),
            case(2, 1024, 4096, timed=True),
            case(2, 400, 4096, "fp64", timed=True),
        ]
    return [
        *(case(2, n, 4096, dtype, True) for dtype in DTYPES for n in (400, 1024, 4096)),
        *(case(18, n, 4096, dtype, True) for dtype in DTYPES for n in (400, 1024)),
        *(case(1, n, 4096, timed=True) for n in (400, 1024)),
        *(
            case(modules, n, 512, dtype)
            for dtype in DTYPES
            for modules in (1, 2, 18)
            for n in (1, 17, 64, 65, 100, 400, 1024, 2048)
        ),
        *(case(modules, 4096, 512, dtype) for dtype in DTYPES for modules in (1, 18)),
        *(case(2, 400, columns, dtype) for dtype in DTYPES for columns in (1, 3, 16, 17, 63, 1000)),
        case(64, 100, 4096),
        case(2, 397, 14336),
        case(2, 397, 4097, "fp64"),
    ]


ITEMS = (1, 2, 8, 18)
"""The numbers of systems that stand for the classes; 18 modules are edited in Llama-3-8B."""

COLUMNS = 4096


def size_classes(size: str) -> list[Case]:
    """Return a case for each class of sizes that ``make tune`` measures, small ones first.

    In the middle of its class: what holds at the largest n alone, a multiple of every tile, need
    not hold below.
    """
    from pyeditfast.ops.cholesky_size_class import LARGEST_ROWS

    rows = [5] if size == "tiny" else [3 * largest // 4 for largest in LARGEST_ROWS]
    columns = 3 if size == "tiny" else COLUMNS
    return [
        _size_class(items, n, columns, dtype) for n in rows for items in ITEMS for dtype in DTYPES
    ]


def _size_class(items: int, n: int, columns: int, dtype: str) -> Case:
    from pyeditfast.ops.cholesky_size_class import size_class

    return replace(
        case(items, n, columns, dtype),
        name=size_class(items, n, columns, DTYPES[dtype]),
        # The rows that the matrices are made of, or two copies of these; and copies of the sides.
        memory=float(DTYPES[dtype].itemsize * items * n * (5 * n + 6 * columns)),
    )
