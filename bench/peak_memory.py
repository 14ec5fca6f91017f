"""Peak memory of one solve and apply beyond its inputs, in a process of its own (Linux only).

``python bench/peak_memory.py published|pyeditfast`` prints one number, in bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

D_IN, D_OUT, ROWS = 14336, 4096, 400


def resident(field: str) -> int:
    """Return ``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def published(keys: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> None:
    """Solve and add as the published code does."""
    from pyeditfast_published.ultraedit import published_shift

    weight += published_shift(keys, values).T.to(weight.dtype)


def candidate(keys: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> None:
    """Solve and add with the ops."""
    from pyeditfast.ops import apply_shift_, solve_shift

    apply_shift_(weight, solve_shift(keys, values))


def main(contender: str) -> int:
    """Return the growth of the peak resident set over the resident set with the inputs in it."""
    run = {"published": published, "pyeditfast": candidate}[contender]
    # Load every library and its thread buffers before measuring.
    small = torch.randn(64, 256)
    run(small, torch.randn(64, 128), torch.randn(128, 256).bfloat16())
    torch.manual_seed(0)
    keys, values = torch.randn(ROWS, D_IN), torch.randn(ROWS, D_OUT)
    weight = torch.empty(D_OUT, D_IN, dtype=torch.bfloat16).normal_(0, 0.02)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(keys, values, weight)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(main(sys.argv[1]))
