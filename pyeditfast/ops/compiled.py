"""The compiled module as a backend, and tensors as its functions take them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from pyeditfast.backends import KERNEL_DTYPES, Candidate, refusing
from pyeditfast.extension import extension_status, load_extension

_ELEMENT_TYPES = {
    torch.float32: "FLOAT32",
    torch.bfloat16: "BFLOAT16",
    torch.float16: "FLOAT16",
}


def cpp_candidate(op: str) -> Candidate:
    """Return the C++ implementation of ``op`` as a candidate: on the CPU, where it was built."""
    return Candidate("cpp", functools.partial(_unavailable, op))


def _unavailable(op: str, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the C++ form runs on the CPU, not on {device.type}"
    module = load_extension()
    if module is None:
        return extension_status()
    return None if hasattr(module, op) else f"the compiled module is older than {op}; build it anew"


def compiled() -> ModuleType:
    """Return the compiled module; raise ``RuntimeError`` with the reason where there is none."""
    module = load_extension()
    if module is None:
        raise RuntimeError(extension_status())
    return module


def compiled_for(candidates: Sequence[Candidate], *dtypes: torch.dtype) -> Sequence[Candidate]:
    """Return the candidates for tensors of ``dtypes``: C++ states the one it does not take."""
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            reason = f"the C++ form takes bfloat16, float16 and float32, not {dtype}"
            return refusing(candidates, "cpp", reason)
    return candidates


def as_matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return address, row stride, column stride and element type of ``[rows, columns]``.

    The tensor has to be kept alive as long as the matrix is in use.
    """
    row_stride, column_stride = tensor.stride()
    element_type: int = getattr(compiled(), _ELEMENT_TYPES[tensor.dtype])
    return tensor.data_ptr(), row_stride, column_stride, element_type
