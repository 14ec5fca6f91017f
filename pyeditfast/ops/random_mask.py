"""Random masks that are functions, not arrays: ``mask(i) = u(seed, i) < ratio``.

Any backend computes any part of a mask with the same bits, so WISE's knowledge shards need no
stored masks. ``u(seed, i)`` is made of word ``i mod 4`` of the block ``i div 4`` of Philox4x32-10;
the equation is in ``pyeditfast.reference.random_mask``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeditfast.backends import Candidate, always, choose, triton_candidate
from pyeditfast.ops.compiled import compiled, cpp_candidate
from pyeditfast.reference.random_mask import check_arguments
from pyeditfast.reference.random_mask import random_mask as reference_mask
from pyeditfast.reference.random_mask import random_uniform as reference_uniform

CANDIDATES = (
    cpp_candidate("random_mask"),
    triton_candidate("random_mask"),
    Candidate("torch", always),
    Candidate("reference", always),
)


def random_mask(
    seed: int, ratio: float, shape: Sequence[int], *, device: torch.device | str | None = None
) -> Tensor:
    """Return a boolean mask of ``shape``, True where ``u(seed, i) < ratio``, ``i`` row-major.

    ``seed`` is an integer in ``[0, 2^64)``; ``ratio`` in ``[0, 1]`` is rounded to float32 and is
    the expected share of True: 0 gives none, 1 gives all. The same seed gives the same bits on
    every backend and device. ``device`` defaults to torch's default device.

    Cost: a Philox block for four elements (18 products of 32 × 32 bits) and one byte written an
    element.

    Raises ``TypeError`` or ``ValueError`` for arguments outside these ranges, with their values.
    """
    shape = check_arguments(seed, shape, ratio=ratio)
    device = _resolve(device)
    chosen = choose("random_mask", CANDIDATES, device)
    if chosen == "triton":
        from pyeditfast_kernels.random_mask import random_mask as launch

        return launch(seed, ratio, shape, device)
    if chosen == "cpp":
        out = torch.empty(shape, dtype=torch.bool, device=device)
        compiled().random_mask(
            out=out.data_ptr(),
            numel=out.numel(),
            seed=seed,
            ratio=ratio,
            offset=0,
            threads=torch.get_num_threads(),
        )
        return out
    return reference_mask(seed, ratio, shape, device=device)


def random_uniform(
    seed: int,
    shape: Sequence[int],
    offset: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return float32 numbers in ``[0, 1)`` of ``shape``: element ``i`` is ``u(seed, offset + i)``.

    These are the numbers that ``random_mask`` compares with its ratio. ``offset`` counts elements:
    a tensor drawn in parts equals the tensor drawn at once. ``device`` defaults to torch's
    default device.

    Cost: a Philox block for four elements and four bytes written an element.

    Raises ``TypeError`` or ``ValueError`` for a seed outside ``[0, 2^64)``, a negative size, or an
    offset that is negative or whose last element lies beyond ``2^63 − 1``.
    """
    shape = check_arguments(seed, shape, offset)
    device = _resolve(device)
    chosen = choose("random_mask", CANDIDATES, device)
    if chosen == "triton":
        from pyeditfast_kernels.random_mask import random_uniform as launch

        return launch(seed, shape, offset, device)
    if chosen == "cpp":
        out = torch.empty(shape, dtype=torch.float32, device=device)
        compiled().random_uniform(
            out=out.data_ptr(),
            numel=out.numel(),
            seed=seed,
            offset=offset,
            threads=torch.get_num_threads(),
        )
        return out
    return reference_uniform(seed, shape, offset, device=device)


def _resolve(device: torch.device | str | None) -> torch.device:
    return torch.get_default_device() if device is None else torch.device(device)
