"""What the launchers share: configurations as data, and one place from which kernels are launched.

A launcher calls ``launch`` with all arguments by name. Inside ``with recording() as launches:``
nothing runs: every launch is noted instead, so that a launcher called on ``meta`` tensors tells
which specializations of its kernels it needs. ``examples()`` in each kernel's file lists such
calls; ``tests/kernels/ahead_of_time.py`` compiles what they ask for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

_launches: ContextVar[list[Launch] | None] = ContextVar("pyeditfast_launches", default=None)

_LARGEST_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: its compile-time sizes, warps and pipeline stages, and why."""

    name: str
    sizes: Mapping[str, int]
    num_warps: int
    num_stages: int
    why: str


@dataclass(frozen=True)
class Launch:
    """One launch: ``arguments`` by name, without the sizes of ``config``."""

    kernel: Any
    grid: tuple[int, ...]
    config: Config
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """A call of a launcher on ``meta`` tensors, and what its machine code must hold.

    ``tensor_cores`` and ``wide_loads`` name the kernels that must use tensor cores and loads of 16
    bytes a thread. Kernels that an earlier example already asked for are left out of the table.
    """

    name: str
    call: Callable[[], object]
    tensor_cores: tuple[str, ...] = ()
    wide_loads: tuple[str, ...] = ()


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    """Launch ``kernel`` on the device of its tensors; a grid with a zero launches nothing.

    Raises ``ValueError`` for a grid beyond CUDA's limits.
    """
    if 0 in grid:
        return
    if any(size > largest for size, largest in zip(grid, _LARGEST_GRID, strict=False)):
        raise ValueError(f"{kernel.__name__} needs a grid of {grid}; CUDA allows {_LARGEST_GRID}")
    launches = _launches.get()
    if launches is not None:
        launches.append(Launch(kernel, grid, config, arguments))
        return
    with _device_of(arguments):
        kernel[grid](
            **arguments,
            **config.sizes,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _device_of(arguments: Mapping[str, Any]) -> contextlib.AbstractContextManager[object]:
    # Triton launches on the current device, which need not be the tensors'.
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            return torch.cuda.device_of(value)
    return contextlib.nullcontext()


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note the launches of the block instead of running them."""
    launches: list[Launch] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


def interprets() -> bool:
    """Say whether kernels run in Triton's interpreter.

    There bfloat16 arithmetic is wrong and a store of float32 to bfloat16 truncates; a kernel that
    feeds bfloat16 to ``tl.dot`` must convert to float32 first.
    """
    return type(tl.sum).__name__ == "InterpretedFunction"
