"""The k-th largest magnitude of a tensor, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import Candidate, always, choose, refusing
from pyeditfast.ops.checks import check_rows
from pyeditfast.ops.compiled import (
    as_matrix,
    as_rows,
    compiled,
    compiled_for,
    cpp_candidate,
    cuda_candidate,
    stream_of,
)
from pyeditfast.ops.memories import check_like
from pyeditfast.reference.magnitude_threshold import kept_elements

CANDIDATES = (
    cuda_candidate("magnitude_threshold"),
    cpp_candidate("magnitude_threshold"),
    Candidate("torch", always),
    Candidate("reference", always),
)


def magnitude_threshold(x: Tensor, density: float, *, base: Tensor | None = None) -> Tensor:
    """Return the k-th largest ``|x − base|`` with ``k = int(density · numel)``, 0-d float32.

    ``x`` of any floating dtype, strides and at least two dimensions; ``base`` like ``x``, 0 unless
    given. The difference is taken in float32 (float64 for float64, which gives float64); NaN counts
    as larger than everything. Raises ``ValueError`` for a density outside ``(0, 1]`` or one that
    keeps no element, and ``TypeError`` or ``ValueError`` for tensors that do not fit.

    Floor: ``x`` and ``base`` read once for each digit of a radix select.
    """
    check_rows("x", x)
    check_density(density, x.numel())
    if base is not None:
        check_like("base", base, "x", x)
    chosen = choose("magnitude_threshold", _candidates(x, base), x.device)
    if chosen == "reference":
        return reference.magnitude_threshold(x, density, base=base)
    if chosen in ("cpp", "cuda"):
        select = _select if chosen == "cpp" else _select_on_cuda
        return select(x, base, kept_elements(x.numel(), density))
    magnitude = _magnitude(x, base)
    # From the near end: kthvalue counts from the smallest.
    return magnitude.kthvalue(magnitude.numel() - kept_elements(x.numel(), density) + 1).values


def check_density(density: float, numel: int) -> None:
    """Require a density that keeps at least one of ``numel`` elements."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is {density}; a number above 0 and up to 1 is needed")
    if kept_elements(numel, density) < 1:
        raise ValueError(f"density {density} keeps none of {numel} elements")


def _candidates(x: Tensor, base: Tensor | None) -> Sequence[Candidate]:
    for name, tensor in (("x", x), ("base", base)):
        if tensor is not None and as_rows(tensor) is None:
            reason = (
                f"the compiled forms take matrices; {name} {tuple(tensor.shape)} has strides "
                f"{tensor.stride()}"
            )
            return refusing(refusing(CANDIDATES, "cpp", reason), "cuda", reason)
    return compiled_for(CANDIDATES, x.dtype)


def _select(x: Tensor, base: Tensor | None, k: int) -> Tensor:
    threshold = compiled().magnitude_threshold(
        **_matrices(x, base), k=k, threads=torch.get_num_threads()
    )
    return torch.tensor(threshold, dtype=torch.float32)


def _select_on_cuda(x: Tensor, base: Tensor | None, k: int) -> Tensor:
    module = compiled()
    matrices = _matrices(x, base)
    size = module.cuda_magnitude_threshold_workspace(matrices["x"][-1], base is not None)
    workspace = torch.empty(size // 8, dtype=torch.int64, device=x.device)
    threshold = torch.empty((), dtype=torch.float32, device=x.device)
    module.cuda_magnitude_threshold(
        **matrices,
        k=k,
        out=threshold.data_ptr(),
        workspace=workspace.data_ptr(),
        stream=stream_of(x.device),
    )
    return threshold


def _matrices(x: Tensor, base: Tensor | None) -> dict[str, Any]:
    matrix, base_matrix = as_rows(x), None if base is None else as_rows(base)
    assert matrix is not None
    return {
        "x": as_matrix(matrix),
        "base": None if base_matrix is None else as_matrix(base_matrix),
        "rows": matrix.shape[0],
        "columns": matrix.shape[1],
    }


def _magnitude(x: Tensor, base: Tensor | None) -> Tensor:
    exact = x if x.element_size() > 2 else x.float()
    if base is None:
        return exact.abs().flatten()
    return (exact - (base if base.element_size() > 2 else base.float())).abs_().flatten()
