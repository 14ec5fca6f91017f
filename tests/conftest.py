"""Fixtures that many tests share."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # On a busy machine an example may take any time. The rest of the profile is hypothesis' own,
    # which draws other examples in every run, and the same ones where CI=true is set.
    patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("patient", settings.default, **patient)
    settings.load_profile("patient")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real editing data, ``shared/data`` beside the checkout or
    ``$PYEDITFAST_DATA``.
    """
    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("PYEDITFAST_DATA", default))
    if not (folder / "counterfact-edit.json").is_file():
        pytest.skip(f"no editing data in {folder}; set PYEDITFAST_DATA to a folder that has it")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Run torch on one thread: tiny shapes gain nothing from more, busy machines lose much."""
    torch.set_num_threads(1)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt: a shell has the programs ignore it that it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def tuned_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let this machine have a GPU called "NVIDIA Test 1", and the files of ``make tune`` be in a
    folder of this test.
    """
    from pyeditfast_kernels import tuned_files

    monkeypatch.setattr(tuned_files, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned_files, "gpu_name", lambda index: "NVIDIA Test 1")
    tuned_files.read_tuned_file.cache_clear()
    yield tmp_path
    tuned_files.read_tuned_file.cache_clear()
