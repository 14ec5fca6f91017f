"""What is known of an op at one size: inputs, truth, other ways to compute it, and its work."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]
Form = Callable[[Inputs], Outputs]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

AUTO = "auto with kernels"
"""The backend ``auto`` as it will be once ``RUN_ON_A_GPU`` names every op, and
``CUDA_RUN_ON_A_GPU`` those of ``ONLY_IN_CUDA``.
"""

ONLY_IN_CUDA = frozenset({"cholesky_solve", "magnitude_threshold"})
"""Ops that have CUDA kernels and no Triton kernel; of those that have both a GPU has to decide."""


@dataclass(frozen=True)
class Case:
    """One op at one size.

    ``inputs(device, generator)`` makes new random ones; ``writes`` names those that ``run`` and the
    other forms change in place, so that each gets its own. ``run`` calls the public op. ``exact``
    gives the truth in float64, of which integers and booleans, and with ``equal`` everything, have
    to be met exactly. ``plain``: forms in plain torch that are as exact; the first is the
    yardstick of the error. ``less_exact``: faster ones that are not. ``bare``: the products alone.
    ``length``: terms of the longest sum, for the floor of the error.

    ``flops`` on the unit ``unit`` (a ceiling's name) and ``bytes`` are the least work there is.
    ``memory``: bytes of the device that a check needs. ``backends``: None for all that the op has,
    but for those in ``without``, which do not take the case.
    ``asynchronous``: nothing waits for the device, so a CUDA graph can hold it.
    """

    op: str
    name: str
    inputs: Callable[[torch.device, torch.Generator], Inputs]
    run: Form
    exact: Form | None = None
    plain: Mapping[str, Form] = field(default_factory=dict)
    less_exact: Mapping[str, Form] = field(default_factory=dict)
    published: Form | None = None
    bare: Form | None = None
    kernel_only: Form | None = None
    writes: tuple[str, ...] = ()
    length: int = 1
    equal: bool = False
    flops: float = 0.0
    unit: str = "bf16"
    bytes: float = 0.0
    memory: float = 0.0
    backends: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    asynchronous: bool = False
    checked: bool = True
    timed: bool = False

    @property
    def key(self) -> str:
        """Return the name under which a step reports that it begins."""
        return f"{self.op}: {self.name}"


def normal(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    scale: float = 1.0,
) -> Tensor:
    """Return normal numbers times ``scale``, never more than one float32 copy beside them."""
    numbers = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return numbers if scale == 1.0 else numbers.mul_(scale)


def terms(dtype: str, length: int) -> int:
    """Return the ``length`` of a case whose sums are float32 and whose result has ``dtype``.

    What a long float32 sum loses cannot be seen in 16 bits, and the floor of the error must not
    grow as if it could.
    """
    return length if dtype == "fp32" else 1


def cases(op: str, size: str) -> list[Case]:
    """Return the cases of an op, from ``bench.gpu.cases.<op>``; of those of one name the first."""
    found: dict[str, Case] = {}
    for case in importlib.import_module(f"bench.gpu.cases.{op}").cases(size):
        found.setdefault(case.name, case)
    return list(found.values())


def backends(case: Case, device: torch.device) -> Iterator[tuple[str, str | None]]:
    """Yield the backends to run a case in, each with the reason why it cannot, or None.

    Those of the op's own ``CANDIDATES`` but for the reference, so that a new one needs no change
    here.
    """
    if case.backends is not None:
        yield from ((name, None) for name in case.backends)
        return
    module = importlib.import_module(f"pyeditfast.ops.{case.op}")
    for candidate in module.CANDIDATES:
        if candidate.backend not in ("reference", *case.without):
            yield candidate.backend, candidate.unavailable(device)


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Run the block in a backend; ``AUTO`` lets ``auto`` take every kernel."""
    from pyeditfast import backend
    from pyeditfast import backends as package

    if name != AUTO:
        with backend(name):
            yield
        return
    before = package.RUN_ON_A_GPU, package.CUDA_RUN_ON_A_GPU
    package.RUN_ON_A_GPU = frozenset({"gram", "covariance", "apply_shift", *_ops_with_kernels()})
    package.CUDA_RUN_ON_A_GPU = ONLY_IN_CUDA
    try:
        with backend("auto"):
            yield
    finally:
        package.RUN_ON_A_GPU, package.CUDA_RUN_ON_A_GPU = before


def _ops_with_kernels() -> Iterator[str]:
    import pkgutil

    import pyeditfast_kernels

    yield from (info.name for info in pkgutil.iter_modules(pyeditfast_kernels.__path__))


def own(case: Case, inputs: Inputs) -> Inputs:
    """Return inputs of which those that are written are copies."""
    return {name: value.clone() if name in case.writes else value for name, value in inputs.items()}
