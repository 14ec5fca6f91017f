"""How far results are from the truth, and whether two are the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu.case import Outputs


def largest_errors(result: Outputs, exact: Outputs) -> Iterator[tuple[str, float, str]]:
    """Yield for every output its name, error and dtype; integers and booleans have 0 or 1.

    The error is ``max |result − exact| / max |exact|``, matrix by matrix so that no float64 copy of
    a large result is whole; NaN where the result has one that the truth has not.
    """
    if set(result) != set(exact):
        raise AssertionError(f"outputs {sorted(result)} where {sorted(exact)} are right")
    for name, truth in exact.items():
        found = result[name]
        if found.shape != truth.shape:
            raise AssertionError(f"{name} is {tuple(found.shape)}, not {tuple(truth.shape)}")
        if not found.is_floating_point():
            yield name, 0.0 if torch.equal(found, truth) else 1.0, str(found.dtype)
            continue
        yield name, relative_error(found, truth), str(found.dtype)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return ``max |result − exact| / max |exact|``."""
    if exact.numel() == 0:
        return 0.0
    pieces = zip(result, exact, strict=True) if result.ndim > 2 else ((result, exact),)
    difference = largest = torch.zeros((), dtype=torch.float64, device=exact.device)
    for part, truth in pieces:
        # maximum hands a NaN on.
        difference = torch.maximum(difference, (part.double() - truth).abs().max())
        largest = torch.maximum(largest, truth.double().abs().max())
    return float(difference / largest) if float(largest) else float(difference)


def same_bits(first: Outputs, second: Outputs) -> bool:
    """Say whether two results are equal bit for bit, NaN with itself."""
    return all(
        torch.equal(
            first[name].contiguous().flatten().view(torch.uint8),
            second[name].contiguous().flatten().view(torch.uint8),
        )
        for name in first
    )
