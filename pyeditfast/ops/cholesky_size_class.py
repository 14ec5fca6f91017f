"""Classes of sizes for which ``make tune`` measures the backends of ``cholesky_solve``."""

from __future__ import annotations

import bisect

import torch

LARGEST_ITEMS = (1, 4, 16)
"""The largest numbers of items of the classes but the last, to which any larger number belongs: so
many items fill a GPU, and more only repeat that."""

LARGEST_ROWS = (64, 128, 256, 512, 1024, 2048, 4096)
"""The largest n of the classes; larger systems are in a class that nobody measures."""

FEWEST_COLUMNS = 1024
"""Where the substitution has fewer columns than that, another form may be the faster, and nobody
measures it."""


def size_class(items: int, n: int, columns: int, dtype: torch.dtype) -> str:
    """Return the name of the class of ``items`` systems ``[n, n]`` with ``columns`` each."""
    numbers = _span(items, LARGEST_ITEMS)
    few = columns < FEWEST_COLUMNS
    return (
        f"{str(dtype).removeprefix('torch.')}, {numbers} item{'s' * (numbers != '1')} of "
        f"{_span(n, LARGEST_ROWS)} rows, "
        + (f"under {FEWEST_COLUMNS} columns" if few else f"{FEWEST_COLUMNS} columns or more")
    )


def _span(number: int, largest: tuple[int, ...]) -> str:
    place = bisect.bisect_left(largest, number)
    if place == len(largest):
        return f"over {largest[-1]}"
    smallest = largest[place - 1] + 1 if place else 1
    return str(largest[place]) if smallest == largest[place] else f"{smallest} to {largest[place]}"
