"""Errors after which a process can use its GPU no more: it reports them and is begun again."""

from __future__ import annotations

import os
import sys

import torch

from bench.gpu.process import DEVICE_IS_LOST


def is_fatal(error: BaseException) -> bool:
    """Say whether the process can use its GPU no more, as after an illegal memory access."""
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text:
        return False
    return any(
        sign in text
        for sign in (
            "CUDA error",
            "illegal memory access",
            "unspecified launch failure",
            "misaligned address",
            "device-side assert",
        )
    )


def leave(error: BaseException) -> None:
    """End the process with the status that has it begun again behind this case."""
    print(f"the device is lost to this process: {error}", file=sys.stderr, flush=True)
    # Not by an exception: what holds tensors would fail once more on the way out.
    os._exit(DEVICE_IS_LOST)


def describe(error: BaseException) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
