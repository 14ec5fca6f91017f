"""What the benchmarks share: real edits, and a tokenizer trained on them."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))


@pytest.fixture(scope="session")
def real_edits():
    """Return 2,000 CounterFact edits, from ``shared/data`` beside the checkout or
    ``$PYEDITFAST_DATA``.
    """
    from pyeditfast import load_edits

    folder = Path(os.environ.get("PYEDITFAST_DATA", REPOSITORY.parent / "shared" / "data"))
    path = folder / "counterfact-edit.json"
    if not path.is_file():
        pytest.skip(f"no editing data in {folder}; set PYEDITFAST_DATA to a folder that has it")
    return list(itertools.islice(load_edits(path), 2000))


@pytest.fixture(scope="session")
def tokenizer(real_edits):
    """Return a byte-level BPE tokenizer of 8,000 tokens trained on the edits."""
    from tiny_models import tiny_tokenizer

    return tiny_tokenizer([f"{edit.prompt} {edit.target}" for edit in real_edits], vocab_size=8000)


def pytest_configure() -> None:
    """Use every core that this process may run on, as both contenders would."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
