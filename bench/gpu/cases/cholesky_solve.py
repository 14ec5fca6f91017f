"""``cholesky_solve``: ``G⁻¹ B`` for the Gram matrices of a turn."""

from __future__ import annotations

import torch

from bench.gpu.case import Case, Inputs, Outputs, normal


def make(
    modules: int, n: int, columns: int, device: torch.device, generator: torch.Generator
) -> Inputs:
    """Return a Gram matrix of ``4 n`` random features and a right-hand side."""
    keys = normal((modules, n, 4 * n), torch.float32, device, generator)
    gram = keys @ keys.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return {"gram": gram, "rhs": normal((modules, n, columns), torch.float32, device, generator)}


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


def case(modules: int, n: int, columns: int, timed: bool = False) -> Case:
    """Return the case of ``modules`` systems of size ``n``."""
    return Case(
        "cholesky_solve",
        f"{modules} of {n}, {columns} columns",
        lambda device, generator: make(modules, n, columns, device, generator),
        run,
        exact=exact,
        plain={"cholesky_ex and cholesky_solve": by_library},
        length=n,
        flops=float(modules * (n**3 / 3 + 2 * n * n * columns)),
        unit="fp32",
        bytes=4.0 * modules * (n * n / 2 + 2 * n * columns),
        memory=float(modules * n * (16 * n + 36 * n + 40 * columns)),
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [case(1, 1, 1), case(2, 13, 7, True), case(3, 40, 5)]
    if size == "small":
        return [case(2, 100, 4096), case(2, 400, 4096, True), case(2, 1024, 4096, True)]
    return [
        case(2, 400, 4096, True),
        case(2, 1024, 4096, True),
        case(18, 400, 4096, True),
        case(2, 4096, 4096, True),
        *(case(modules, n, 512) for modules in (1, 2, 18) for n in (1, 17, 100, 2048)),
        case(64, 100, 4096),
        case(2, 397, 14336),
    ]
