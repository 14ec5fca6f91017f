"""``edit_values``: ``v = −lr · ‖k̂‖² · ĝ``."""

from __future__ import annotations

import dataclasses

import torch

from bench.gpu.case import DTYPES, Case, Inputs, Outputs, normal

LR = 1e-6


def make(n: int, d_in: int, d_out: int, dtype: str) -> Case:
    """Return the case of ``n`` rows, not timed."""

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        from pyeditfast.ops import RunningMoments

        keys = normal((n, d_in), DTYPES[dtype], device, generator)
        grads = normal((n, d_out), DTYPES[dtype], device, generator, 1e-3)
        moments = RunningMoments(d_in + d_out, device=device)
        seen = normal((64, d_in + d_out), torch.float32, device, generator)
        moments.update(torch.cat([seen[:, :d_in], 1e-3 * seen[:, d_in:]], -1))
        return {"keys": keys, "grads": grads, "moments": moments}

    return Case(
        "edit_values",
        f"{dtype}, {n} of {d_in} + {d_out}",
        inputs,
        run,
        exact=lambda inputs: formula(inputs, torch.float64),
        plain={"float32": lambda inputs: formula(inputs, torch.float32)},
        published=lambda inputs: formula(inputs, torch.float32, by_norm=True),
        length=d_in,
        bytes=float(n * ((d_in + d_out) * DTYPES[dtype].itemsize + 4 * d_out)),
        memory=64.0 * n * (d_in + d_out),
    )


def run(inputs: Inputs) -> Outputs:
    """Call the op."""
    from pyeditfast.ops import edit_values

    return {"values": edit_values(inputs["keys"], inputs["grads"], inputs["moments"], LR)}


def formula(inputs: Inputs, dtype: torch.dtype, by_norm: bool = False) -> Outputs:
    """Return the values computed in ``dtype``; ``by_norm``: of the joined rows, as published."""
    moments = inputs["moments"]
    d_in = inputs["keys"].shape[1]
    mean, std = moments.mean.to(dtype), moments.std.to(dtype)
    std = std + torch.finfo(torch.float32).eps
    if by_norm:
        rows = torch.cat([inputs["keys"].to(dtype), inputs["grads"].to(dtype)], -1)
        keys, grads = ((rows - mean) / std).split([d_in, rows.shape[1] - d_in], -1)
        return {"values": -LR * keys.norm(dim=-1, keepdim=True).square() * grads}
    keys = (inputs["keys"].to(dtype) - mean[:d_in]) / std[:d_in]
    grads = (inputs["grads"].to(dtype) - mean[d_in:]) / std[d_in:]
    return {"values": -LR * keys.square().sum(-1, keepdim=True) * grads}


def timed(case: Case) -> Case:
    """Return the same case, timed as well."""
    return dataclasses.replace(case, timed=True)


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [timed(make(9, 48, 32, "bf16")), make(5, 33, 17, "fp16"), make(3, 40, 8, "fp32")]
    if size == "small":
        return [timed(make(400, 14336, 4096, "bf16")), make(100, 14336, 4096, "fp32")]
    return [
        timed(make(400, 14336, 4096, "bf16")),
        timed(make(4096, 14336, 4096, "bf16")),
        *(make(n, 14336, 4096, dtype) for n in (100, 2048) for dtype in DTYPES),
        make(397, 14335, 4097, "bf16"),
        make(397, 4096, 14336, "fp32"),
    ]
