"""Which implementation of an op runs, and why.

Every op lists its candidates, best first. ``"auto"`` takes the first that is usable on the
tensor's device; any other name insists on one backend.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "cpp", "cuda", "triton")

RUN_ON_A_GPU: frozenset[str] = frozenset()
"""The ops whose Triton kernels a GPU has run and found correct; ``auto`` takes no others."""

CUDA_RUN_ON_A_GPU: frozenset[str] = frozenset()
"""The same of the CUDA kernels in ``csrc``."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the Triton kernels read."""

_requested: ContextVar[str] = ContextVar("pyeditfast_backend", default="auto")


def always(device: torch.device) -> str | None:
    """Say that a candidate runs on every device."""
    return None


@dataclass(frozen=True)
class Candidate:
    """One implementation of an op.

    ``unavailable(device)`` returns None where the implementation can run, else the reason why not.
    ``not_automatic(device)`` returns None where ``"auto"`` may take it, else the reason why it has
    to be asked for. ``why`` is the reason for which ``"auto"`` takes it, None where it is just the
    first choice.
    """

    backend: str
    unavailable: Callable[[torch.device], str | None]
    not_automatic: Callable[[torch.device], str | None] = always
    why: str | None = None


@dataclass(frozen=True)
class Choice:
    """The backend that an op takes on a device, and the reason."""

    op: str
    backend: str
    reason: str


def triton_candidate(op: str) -> Candidate:
    """Return the Triton implementation of ``op`` as a candidate.

    It takes CUDA tensors; CPU tensors only in Triton's interpreter, that is where
    ``TRITON_INTERPRET=1`` was set before triton was imported. ``"auto"`` takes it on CUDA, once
    ``RUN_ON_A_GPU`` names the op.
    """
    return Candidate("triton", _triton_unavailable, functools.partial(_triton_not_automatic, op))


def _triton_unavailable(device: torch.device) -> str | None:
    if not _triton_is_installed():
        return "triton is not installed; pip install triton"
    if device.type == "cuda" or (device.type == "cpu" and _interprets()):
        return None
    if device.type == "cpu":
        return "it needs a CUDA device, or TRITON_INTERPRET=1 set before triton is imported"
    return f"it runs on CUDA devices, not on {device.type}"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_not_automatic(op: str, device: torch.device) -> str | None:
    if device.type != "cuda" or _interprets():
        return "Triton's interpreter is for tests"
    return None if op in RUN_ON_A_GPU else "no GPU has run this kernel yet"


def _interprets() -> bool:
    # Triton decides when it is imported, and is imported only when a kernel is launched.
    language = sys.modules.get("triton.language")
    if language is None:
        return os.environ.get("TRITON_INTERPRET") == "1"
    return type(language.sum).__name__ == "InterpretedFunction"


def fitting(candidates: Sequence[Candidate], *dtypes: torch.dtype) -> Sequence[Candidate]:
    """Return the candidates for tensors of ``dtypes``: Triton states the one it does not take."""
    unfit = [dtype for dtype in dtypes if dtype not in KERNEL_DTYPES]
    if not unfit:
        return candidates
    reason = f"its kernels take bfloat16, float16 and float32, not {unfit[0]}"
    return refusing(candidates, "triton", reason)


def refusing(candidates: Sequence[Candidate], backend: str, reason: str) -> Sequence[Candidate]:
    """Return the candidates, of which ``backend`` now states ``reason`` for not being usable."""
    return [
        replace(candidate, unavailable=lambda device: reason)
        if candidate.backend == backend
        else candidate
        for candidate in candidates
    ]


def limiting(
    candidates: Sequence[Candidate],
    backend: str,
    not_automatic: Callable[[torch.device], str | None],
    why: str | None = None,
) -> Sequence[Candidate]:
    """Return the candidates, of which ``"auto"`` takes ``backend`` only where ``not_automatic``
    returns None too, and then for the reason ``why``; it is asked last.
    """

    def limited(candidate: Candidate) -> Candidate:
        first = candidate.not_automatic
        return replace(
            candidate,
            not_automatic=lambda device: first(device) or not_automatic(device),
            why=why,
        )

    return [
        limited(candidate) if candidate.backend == backend else candidate
        for candidate in candidates
    ]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every op inside a ``with`` block.

    ``"auto"`` (the default) takes the fastest that runs on the tensor's device, ``"reference"`` the
    plain equations, ``"torch"`` the fast torch forms, ``"cpp"`` and ``"cuda"`` the compiled
    extension on the CPU and on CUDA, ``"triton"`` the Triton kernels: on CUDA, or on the CPU in
    Triton's interpreter, for which ``TRITON_INTERPRET=1`` has to be set before triton is imported.
    An op that lacks the named backend raises ``ValueError`` when it is called. The choice holds for
    the current thread or task only. Raises ``ValueError`` for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def explain(op: str, candidates: Sequence[Candidate], device: torch.device) -> Choice:
    """Return the backend that ``op`` takes on ``device`` and why, without running anything."""
    requested = _requested.get()
    passed_over: list[str] = []
    for candidate in candidates:
        if requested not in ("auto", candidate.backend):
            continue
        reason = candidate.unavailable(device)
        if reason is None and requested == "auto":
            reason = candidate.not_automatic(device)
        if reason is None:
            if requested != "auto":
                why = "asked for"
            elif passed_over:
                why = "; ".join(passed_over)
            else:
                why = candidate.why or f"first choice on {device.type}"
            return Choice(op, candidate.backend, why)
        passed_over.append(f"{candidate.backend} not used: {reason}")
    names = ", ".join(candidate.backend for candidate in candidates)
    detail = "; ".join(passed_over) or f"it has {names}"
    raise ValueError(f"{op} has no usable backend {requested!r} on {device.type} ({detail})")


_logged: set[tuple[str, str, str]] = set()


def _log_once(choice: Choice, device_type: str) -> None:
    # Whatever the reason: some tell shapes, and nearly every prompt has a shape of its own.
    logged = (choice.op, choice.backend, device_type)
    if logged not in _logged:
        _logged.add(logged)
        logger.info("%s on %s: %s (%s)", choice.op, device_type, choice.backend, choice.reason)


def choose(op: str, candidates: Sequence[Candidate], device: torch.device) -> str:
    """Return the name of the backend that ``op`` takes on ``device``; log it the first time."""
    choice = explain(op, candidates, device)
    _log_once(choice, device.type)
    return choice.backend


def chosen_backends(device: torch.device | str = "cpu") -> list[Choice]:
    """Return what every op would take on ``device`` under the backend now in force."""
    from pyeditfast import ops

    device = torch.device(device)
    choices = []
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        candidates = getattr(module, "CANDIDATES", None)
        if candidates is not None:
            choices.append(explain(info.name, candidates, device))
    return choices
