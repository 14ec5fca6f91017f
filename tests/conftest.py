"""Fixtures that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


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
