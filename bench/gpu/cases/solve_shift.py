"""``solve_shift``, and with ``apply_shift_`` the whole of UltraEdit's update after the gradients.

Its own backends are torch alone; it is the ops inside that have kernels. So it runs as ``auto``
will once they are taken by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.case import AUTO, Case, Inputs, Outputs, normal


def make(
    shape: tuple[int, int, int, int],
    weight: bool,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    """Return keys, values of an UltraEdit turn's size, and perhaps a weight."""
    modules, n, d_in, d_out = shape
    inputs: Inputs = {
        "keys": normal((modules, n, d_in), torch.bfloat16, device, generator),
        "values": normal((modules, n, d_out), torch.float32, device, generator, 1e-2),
    }
    if weight:
        size = (modules, d_out, d_in)
        inputs["weight"] = normal(size, torch.bfloat16, device, generator, 0.02)
    return inputs


def solve(inputs: Inputs) -> Outputs:
    """Call the op and make its shift dense."""
    from pyeditfast.ops import solve_shift

    return {"shift": solve_shift(inputs["keys"], inputs["values"]).dense()}


def solve_and_apply(inputs: Inputs) -> Outputs:
    """Call both ops."""
    from pyeditfast.ops import apply_shift_, solve_shift

    shift = solve_shift(inputs["keys"], inputs["values"])
    return {"weight": apply_shift_(inputs["weight"], shift)}


def dual(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Return ``Δᵀ = (G⁻¹ V)ᵀ K`` in ``dtype``."""
    keys, values = inputs["keys"].to(dtype), inputs["values"].to(dtype)
    gram = keys @ keys.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(values, factor).mT @ keys


def published(inputs: Inputs) -> Outputs:
    """Solve with ``d_in × d_in`` matrices and add, module by module, as published."""
    from pyeditfast_published.ultraedit import published_shift

    for keys, values, weight in zip(
        inputs["keys"].float(), inputs["values"], inputs["weight"], strict=True
    ):
        weight += published_shift(keys, values).T.to(weight.dtype)
    return {"weight": inputs["weight"]}


def plain_solve_and_apply(inputs: Inputs) -> Outputs:
    """Solve in dual form in float32 and add, in plain torch."""
    weight = inputs["weight"]
    weight += dual(inputs, torch.float32).to(weight.dtype)
    return {"weight": weight}


def solving(modules: int, n: int, d_in: int, d_out: int) -> Case:
    """Return the case of the solve alone."""
    shape = (modules, n, d_in, d_out)
    return Case(
        "solve_shift",
        f"{modules} of {n}, {d_in} → {d_out}",
        lambda device, generator: make(shape, False, device, generator),
        solve,
        exact=lambda inputs: {"shift": dual(inputs, torch.float64)},
        plain={"dual in float32": lambda inputs: {"shift": dual(inputs, torch.float32)}},
        length=n,
        memory=float(modules * (32 * d_in * d_out + 64 * n * (n + d_in + d_out))),
        backends=(AUTO, "torch"),
    )


def solving_and_applying(modules: int, n: int, d_in: int, d_out: int) -> Case:
    """Return the timed case of solve and apply."""
    shape = (modules, n, d_in, d_out)
    flops = n * n * d_in + n**3 / 3 + 2 * n * n * d_out + 2 * n * d_in * d_out
    return Case(
        "solve_shift",
        f"solve and apply, {modules} of {n}",
        lambda device, generator: make(shape, True, device, generator),
        solve_and_apply,
        exact=lambda inputs: {"weight": inputs["weight"].double() + dual(inputs, torch.float64)},
        plain={"dual in float32": plain_solve_and_apply},
        published=published,
        writes=("weight",),
        flops=float(modules * flops),
        bytes=float(modules * (4 * d_in * d_out + 2 * n * d_in + 4 * n * d_out)),
        memory=float(modules * 40 * d_in * d_out + 16 * d_in * d_in),
        backends=(AUTO, "torch"),
        timed=True,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [solving_and_applying(2, 9, 40, 24), solving(1, 30, 20, 33)]
    if size == "small":
        return [solving_and_applying(2, 400, 14336, 4096), solving(2, 100, 4096, 14336)]
    return [
        solving_and_applying(2, 400, 14336, 4096),
        *(solving(2, n, 14336, 4096) for n in (100, 400, 2048)),
        *(solving(2, n, 4096, 14336) for n in (400, 4096)),
        solving(18, 400, 4096, 14336),
    ]
