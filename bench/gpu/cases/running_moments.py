"""``RunningMoments.update``: mean and deviation of a turn's keys and gradients."""

from __future__ import annotations

import torch

from bench.gpu.case import DTYPES, Case, Inputs, Outputs, normal

MICRO_BATCH = 40


def segments_of(n: int) -> list[int]:
    """Return the rows of the micro-batches that ``n`` rows are cut into."""
    rest = n % MICRO_BATCH
    return [MICRO_BATCH] * (n // MICRO_BATCH) + ([rest] if rest else [])


def run(inputs: Inputs, variance: str) -> Outputs:
    """Call the op on new moments; the float64 state is returned as float32."""
    from pyeditfast.ops import RunningMoments

    keys, grads = inputs["keys"], inputs["grads"]
    moments = RunningMoments(keys.shape[1] + grads.shape[1], variance, device=keys.device)
    moments.update(keys, grads, segments=segments_of(keys.shape[0]))
    return {"mean": moments.mean.float(), "std": moments.std.float()}


def formula(inputs: Inputs, variance: str, dtype: torch.dtype) -> Outputs:
    """Return both computed in ``dtype``, the published variance by its micro-batches."""
    rows = torch.cat([inputs["keys"], inputs["grads"]], -1).to(dtype)
    n = rows.shape[0]
    mean = rows.mean(0)
    if variance == "unbiased":
        return {"mean": mean, "std": rows.std(0)}
    squares = torch.zeros_like(mean)
    for part in rows.split(segments_of(n)):
        m = part.shape[0]
        within = (part - part.mean(0)).square().sum(0)
        squares += within * (m / (m - 1) if m > 1 else 1.0)
        squares += m * (part.mean(0) - mean).square()
    return {"mean": mean, "std": (squares / (n - 1)).sqrt()}


def published(inputs: Inputs) -> Outputs:
    """Take in micro-batch after micro-batch, as published."""
    from pyeditfast_published.ultraedit import PublishedMoments

    keys, grads = inputs["keys"], inputs["grads"]
    moments = PublishedMoments(
        keys.shape[1] + grads.shape[1],
        variance="published",
        dtype=torch.float32,
        device=keys.device,
    )
    sizes = segments_of(keys.shape[0])
    for some_keys, some_grads in zip(keys.split(sizes), grads.split(sizes), strict=True):
        moments.update(torch.cat([some_keys, some_grads], -1).float())
    return {"mean": moments.mean, "std": moments.std}


def case(
    n: int, d_in: int, d_out: int, dtype: str, variance: str = "unbiased", timed: bool = False
) -> Case:
    """Return the case of ``n`` rows."""
    return Case(
        "running_moments",
        f"{dtype}, {n} of {d_in} + {d_out}, {variance}",
        lambda device, generator: {
            "keys": normal((n, d_in), DTYPES[dtype], device, generator).add_(3.0),
            "grads": normal((n, d_out), DTYPES[dtype], device, generator),
        },
        lambda inputs: run(inputs, variance),
        exact=lambda inputs: formula(inputs, variance, torch.float64),
        plain={"float32": lambda inputs: formula(inputs, variance, torch.float32)},
        published=published if timed else None,
        length=n,
        bytes=float((d_in + d_out) * (n * DTYPES[dtype].itemsize + 16)),
        memory=64.0 * n * (d_in + d_out),
        timed=timed,
    )


def cases(size: str) -> list[Case]:
    """Return the cases of a size."""
    if size == "tiny":
        return [
            case(50, 33, 17, "bf16", timed=True),
            case(45, 20, 7, "fp16", "published"),
            case(9, 48, 16, "fp32"),
        ]
    shape = (14336, 4096)
    if size == "small":
        return [case(400, *shape, "bf16", timed=True), case(100, *shape, "fp32", "published")]
    return [
        case(400, *shape, "bf16", timed=True),
        case(4096, *shape, "bf16", timed=True),
        *(case(n, *shape, dtype) for n in (100, 2048) for dtype in DTYPES),
        *(case(397, *shape, dtype, "published") for dtype in DTYPES),
        case(10_000, 14335, 4097, "bf16"),
    ]
