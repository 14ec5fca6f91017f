"""Step ``ceilings``: what this GPU reaches at best, by torch's own copy and products.

``copy`` counts bytes read and written; ``bf16``, ``fp32`` and ``fp64`` are products of random
square matrices, float32 without TF32.
"""

from __future__ import annotations

import torch

from bench.gpu.clock import Clock, clock_for, measure
from bench.gpu.options import device_of, parser
from bench.gpu.rows import emit

COPIED = {"tiny": 1 << 16, "small": 1 << 30, "full": 2 << 30}
"""Bytes that are copied."""

WIDTHS = {
    "tiny": {"bf16": 64, "fp32": 64, "fp64": 64},
    "small": {"bf16": 8192, "fp32": 4096, "fp64": 4096},
    "full": {"bf16": 8192, "fp32": 8192, "fp64": 8192},
}

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

BUDGET = 0.3


def copy_bandwidth(device: torch.device, clock: Clock, count: int) -> float:
    """Return the bytes a second that a copy reads and writes."""
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = measure(clock, lambda _: target.copy_(source), lambda _: None, BUDGET)
    return 2 * count / found.median


def matmul_rate(device: torch.device, clock: Clock, dtype: torch.dtype, width: int) -> float:
    """Return the FLOPs a second of a square product."""
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    found = measure(clock, lambda _: torch.mm(a, b, out=out), lambda _: None, BUDGET)
    return 2 * width**3 / found.median


def main() -> None:
    """Measure all of them."""
    options = parser(__doc__).parse_args()
    device = device_of(options)
    clock = clock_for(device)
    bandwidth = copy_bandwidth(device, clock, COPIED[options.size])
    emit("ceiling", name="copy", value=bandwidth, unit="bytes/s")
    for name, width in WIDTHS[options.size].items():
        rate = matmul_rate(device, clock, DTYPES[name], width)
        emit("ceiling", name=name, value=rate, unit="FLOP/s")


if __name__ == "__main__":
    main()
