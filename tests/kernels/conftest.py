"""Where the kernels' tests run.

They need a process of their own: on a CUDA device, or else in Triton's interpreter, which has to be
asked for before triton is imported. So they run only when this folder, or something in it, is named
on the command line, as `make test` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from guarded_memory import GuardedMemory

HERE = Path(__file__).resolve().parent

ANYWHERE = ("test_ahead_of_time.py",)
"""Tests that launch no kernel."""


def _is_named(config: pytest.Config) -> bool:
    """Say whether the command line names this folder, or something in it, and nothing else."""
    paths = [(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args]
    return all(path == HERE or HERE in path.parents for path in paths)


def pytest_configure(config: pytest.Config) -> None:
    if _is_named(config) and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.parent != HERE or collection_path.name in ANYWHERE:
        return None
    return None if _is_named(config) else True


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device that the kernels run on: the GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter() -> Iterator[None]:
    """Spare Triton's interpreter half of its work, where that is what runs the kernels."""
    from pyeditfast_kernels.launch import interprets

    with pytest.MonkeyPatch.context() as monkeypatch:
        if interprets():
            from patched_once import patch_once

            patch_once(monkeypatch)
        yield


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    """Let every op take its kernel, or fail."""
    from pyeditfast import backend

    with backend("triton"):
        yield


@pytest.fixture(autouse=True)
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill every new tensor with NaN, and fail the test if a kernel wrote beside one."""
    memory = GuardedMemory()
    monkeypatch.setattr(torch, "empty", memory.empty)
    monkeypatch.setattr(torch, "empty_like", memory.empty_like)
    yield
    memory.check()
