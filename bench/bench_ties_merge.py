"""TIES of two shards of a 14336 × 4096 module, against the form with ``topk``."""

from __future__ import annotations

import pytest
import torch

from pyeditfast import reference
from pyeditfast.ops import random_mask, ties_merge
from pyeditfast_published.ties_merge import published_ties

SHAPE = (4096, 14336)
DENSITY = 0.53


def shards(seed: int, dtype: torch.dtype, shape: tuple[int, int] = SHAPE):
    """Return a main memory and two shards, each moved where its mask of a fifth allows."""
    generator = torch.Generator().manual_seed(seed)
    main = torch.empty(shape).normal_(0, 0.02, generator=generator).to(dtype)
    sides = []
    for shard in range(2):
        moved = torch.empty(shape).normal_(0, 0.01, generator=generator)
        moved.masked_fill_(~random_mask(seed + shard, 0.2, shape), 0.0)
        sides.append((main + moved).to(dtype))
    return main, sides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("contender", ["published", "pyeditfast"])
def bench_ties_merge(benchmark, contender, dtype):
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"TIES of two shards, 58.7M elements, {name}"
    benchmark.name = contender
    if contender == "pyeditfast":
        main, sides = shards(0, dtype, (512, 1024))
        expected = reference.ties_merge(main, sides, DENSITY)
        assert torch.equal(ties_merge(main, sides, DENSITY), expected)
        benchmark.extra_info["equal_to_the_reference"] = True
    run = {"published": published_ties, "pyeditfast": ties_merge}[contender]
    seeds = iter(range(1, 100))

    def fresh():
        return (*shards(next(seeds), dtype), DENSITY), {}

    rounds = 2 if contender == "published" else 5
    benchmark.pedantic(run, setup=fresh, rounds=rounds, warmup_rounds=1)
