"""The compiled module as a backend, and tensors as its functions take them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from pyeditfast import backends
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


def cuda_candidate(op: str) -> Candidate:
    """Return the CUDA implementation of ``op`` as a candidate: on CUDA, where nvcc built it.

    ``"auto"`` takes it once ``CUDA_RUN_ON_A_GPU`` names the op. CPU tensors are taken only where
    the compiled module emulates CUDA, for tests.
    """
    return Candidate(
        "cuda",
        functools.partial(_cuda_unavailable, f"cuda_{op}"),
        functools.partial(_cuda_not_automatic, op),
    )


def _cuda_unavailable(function: str, device: torch.device) -> str | None:
    module = load_extension()
    if module is None:
        return extension_status() if device.type == "cuda" else _needs_cuda(device)
    info = module.build_info()
    if device.type != ("cpu" if info["cuda_emulated"] else "cuda"):
        return _needs_cuda(device)
    if not (info["cuda"] or info["cuda_emulated"]):
        return f"the compiled module has no CUDA ({info['cuda_note']})"
    if not hasattr(module, function):
        return f"the compiled module is older than {function}; build it anew"
    return None


def _needs_cuda(device: torch.device) -> str:
    return f"the CUDA form runs on CUDA devices, not on {device.type}"


def _cuda_not_automatic(op: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "emulated CUDA is for tests"
    return None if op in backends.CUDA_RUN_ON_A_GPU else "no GPU has run this kernel yet"


def stream_of(device: torch.device) -> tuple[int, int]:
    """Return number and current stream of a CUDA device, as the compiled functions take them."""
    if device.type != "cuda":
        return 0, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def compiled() -> ModuleType:
    """Return the compiled module; raise ``RuntimeError`` with the reason where there is none."""
    module = load_extension()
    if module is None:
        raise RuntimeError(extension_status())
    return module


def compiled_for(candidates: Sequence[Candidate], *dtypes: torch.dtype) -> Sequence[Candidate]:
    """Return the candidates for tensors of ``dtypes``: C++ and CUDA state the one they do not
    take.
    """
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            reason = f"takes bfloat16, float16 and float32, not {dtype}"
            candidates = refusing(candidates, "cpp", f"the C++ form {reason}")
            return refusing(candidates, "cuda", f"the CUDA form {reason}")
    return candidates


def as_rows(tensor: Tensor) -> Tensor | None:
    """Return ``[..., columns]`` as ``[rows, columns]``, None where that takes a copy."""
    if tensor.ndim == 2:
        return tensor
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return None


def as_matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return address, row stride, column stride and element type of ``[rows, columns]``.

    The tensor has to be kept alive as long as the matrix is in use.
    """
    row_stride, column_stride = tensor.stride()
    element_type: int = getattr(compiled(), _ELEMENT_TYPES[tensor.dtype])
    return tensor.data_ptr(), row_stride, column_stride, element_type
