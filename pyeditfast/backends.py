"""Which implementation of an op runs, and why.

Every op lists its candidates, best first. ``"auto"`` takes the first that is usable on the
tensor's device; any other name insists on one backend.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "cpp")

_requested: ContextVar[str] = ContextVar("pyeditfast_backend", default="auto")


@dataclass(frozen=True)
class Candidate:
    """One implementation of an op.

    ``unavailable(device)`` returns None where the implementation can run, else the reason why not.
    """

    backend: str
    unavailable: Callable[[torch.device], str | None]


@dataclass(frozen=True)
class Choice:
    """The backend that an op takes on a device, and the reason."""

    op: str
    backend: str
    reason: str


def always(device: torch.device) -> str | None:
    """Say that a candidate runs on every device."""
    return None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every op inside a ``with`` block.

    ``"auto"`` (the default) takes the fastest that runs on the tensor's device, ``"reference"`` the
    plain equations, ``"torch"`` the fast torch forms, ``"cpp"`` the compiled extension. An op that
    lacks the named backend raises ``ValueError`` when it is called. The choice holds for the
    current thread or task only. Raises ``ValueError`` for an unknown name.
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
        if reason is None:
            if requested != "auto":
                why = "asked for"
            elif passed_over:
                why = "; ".join(passed_over)
            else:
                why = f"first choice on {device.type}"
            return Choice(op, candidate.backend, why)
        passed_over.append(f"{candidate.backend} not used: {reason}")
    names = ", ".join(candidate.backend for candidate in candidates)
    detail = "; ".join(passed_over) or f"it has {names}"
    raise ValueError(f"{op} has no usable backend {requested!r} on {device.type} ({detail})")


@functools.cache
def _log_once(choice: Choice, device_type: str) -> None:
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
