"""Solve and apply on a 14336 × 4096 bf16 weight: time, and peak memory beyond the inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peak_memory
import pytest
import torch


@pytest.mark.parametrize("contender", ["published", "pyeditfast"])
def bench_solve_and_apply(benchmark, contender):
    benchmark.group = "solve and apply n=400 14336→4096 bf16 weight"
    benchmark.name = contender
    script = Path(peak_memory.__file__)
    printed = subprocess.run(
        [sys.executable, str(script), contender], capture_output=True, text=True, check=True
    ).stdout
    benchmark.extra_info["peak_bytes_beyond_inputs"] = int(printed)
    if contender == "pyeditfast":
        assert int(printed) <= 100e6
    run = {"published": peak_memory.published, "pyeditfast": peak_memory.candidate}[contender]
    weight = torch.empty(4096, 14336, dtype=torch.bfloat16).normal_(0, 0.02)

    def fresh():
        keys = torch.randn(peak_memory.ROWS, peak_memory.D_IN)
        return (keys, torch.randn(peak_memory.ROWS, peak_memory.D_OUT), weight), {}

    rounds = 3 if contender == "published" else 9
    benchmark.pedantic(run, setup=fresh, rounds=rounds, warmup_rounds=1)
