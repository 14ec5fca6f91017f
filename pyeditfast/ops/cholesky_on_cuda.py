"""The CUDA form of ``cholesky_solve``."""

from __future__ import annotations

import torch
from torch import Tensor

from pyeditfast.ops.compiled import compiled, stream_of


def solve_on_cuda(
    gram: Tensor, rhs: Tensor, *, overwrite_gram: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ``G⁻¹ B`` and, for every item, 0 or the first failing pivot, counted from 1.

    ``gram`` ``[..., n, n]`` and ``rhs`` ``[..., n, m]``, of any strides, both float32 or both
    float64; what ``gram`` holds above the diagonal does not matter. The pivots are an int32
    ``[...]`` on the device, as ``torch.linalg.cholesky_ex`` returns them, except that an infinite
    pivot fails too; the solution of an item with a failing pivot is NaN. Nothing waits for the
    device. With ``overwrite_gram`` no second matrix of that size exists; ``gram``, which has to be
    contiguous then, is left without use.
    """
    module = compiled()
    n, columns = rhs.shape[-2:]
    info = torch.zeros(gram.shape[:-2], dtype=torch.int32, device=gram.device)
    solution = rhs.clone(memory_format=torch.contiguous_format)
    if solution.numel() == 0:
        return solution, info
    factor = gram if overwrite_gram else gram.clone(memory_format=torch.contiguous_format)
    assert factor.is_contiguous()
    sizes = {"element_bits": 8 * gram.element_size(), "items": info.numel(), "n": n}
    size = module.cuda_cholesky_solve_workspace(**sizes)
    workspace = torch.empty(size // gram.element_size(), dtype=gram.dtype, device=gram.device)
    module.cuda_cholesky_solve(
        gram=factor.data_ptr(),
        rhs=solution.data_ptr(),
        columns=columns,
        info=info.data_ptr(),
        workspace=workspace.data_ptr(),
        stream=stream_of(gram.device),
        **sizes,
    )
    return solution, info
