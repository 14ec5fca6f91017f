"""Plain-torch forms of ops on the CPU, as good as torch makes them: the contenders of
``bench_compiled.py`` where ``backend("torch")`` is not the best of them.

What is done in place costs no fresh memory, and in blocks of rows none that leaves the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

BLOCK_ELEMENTS = 1 << 18
"""1 MB of float32: some temporaries of it stay in the second-level caches of two cores."""


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of about ``BLOCK_ELEMENTS`` elements."""
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def step_with_stored_mask(
    weight: Tensor, grad: Tensor, main: Tensor, left_out: Tensor, decay: float, bound: float
) -> None:
    """Take the step of ``masked_sgd_`` with ``lr`` 1, of a mask that is there: ``left_out`` is what
    it leaves out.
    """
    for rows in row_blocks(*weight.shape):
        change = grad[rows].masked_fill(left_out[rows], 0.0)
        new, centre = weight[rows].float(), main[rows].float()
        new.sub_(change.add_(new, alpha=decay))
        torch.maximum(new, torch.sub(centre, bound, out=change), out=new)
        torch.minimum(new, torch.add(centre, bound, out=change), out=new)
        if weight.dtype != torch.float32:
            weight[rows] = new


def edit_values_in_blocks(
    keys: Tensor, grads: Tensor, mean: Tensor, scale: Tensor, lr: float
) -> Tensor:
    """Return ``edit_values`` for the moments' mean and scale."""
    d_in = keys.shape[1]
    values = torch.empty(grads.shape)
    for rows in row_blocks(keys.shape[0], d_in):
        keys_hat = torch.sub(keys[rows], mean[:d_in]).mul_(scale[:d_in])
        weight = torch.linalg.vector_norm(keys_hat, dim=-1, keepdim=True).square_().mul_(-lr)
        out = torch.sub(grads[rows], mean[d_in:], out=values[rows])
        out.mul_(scale[d_in:]).mul_(weight)
    return values


def silu_gaps(main: Tensor, side: Tensor) -> Tensor:
    """Return the gaps of tokens for outputs ``[tokens, d_out]``, activation silu."""
    if main.dtype == torch.float32:
        difference = silu(side).sub_(silu(main))
    else:
        difference = silu(side.float(), inplace=True).sub_(silu(main.float(), inplace=True))
    return torch.linalg.vector_norm(difference, dim=-1)


def silu_gaps_in_blocks(main: Tensor, side: Tensor) -> Tensor:
    """Return what ``silu_gaps`` returns."""
    return torch.cat([silu_gaps(main[rows], side[rows]) for rows in row_blocks(*main.shape)])
