"""Peak memory of one primal solve beyond its inputs, in a process of its own (Linux only).

``python bench/peak_memory_primal.py published|pyeditfast`` prints one number, in bytes. The matrix
of the normal equations alone has ``MATRIX_BYTES``, the result ``RESULT_BYTES``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from peak_memory import resident

D_IN, D_OUT, ROWS = 14336, 256, 4096
MATRIX_BYTES = 4 * D_IN * D_IN
RESULT_BYTES = 4 * D_IN * D_OUT


def published(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``Δᵀ`` as the published code solves for it."""
    from pyeditfast_published.ultraedit import published_shift

    return published_shift(keys, values).T


def candidate(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``Δᵀ`` from the op."""
    from pyeditfast.ops import solve_shift

    return solve_shift(keys, values, form="primal").dense()


def main(contender: str) -> int:
    """Return the growth of the peak resident set over the resident set with the inputs in it."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    run = {"published": published, "pyeditfast": candidate}[contender]
    # Load every library and its thread buffers before measuring.
    run(torch.randn(1100, 1024), torch.randn(1100, D_OUT))
    torch.manual_seed(0)
    keys, values = torch.randn(ROWS, D_IN), torch.randn(ROWS, D_OUT)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(keys, values)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(main(sys.argv[1]))
