"""The kernels' own tests, in a process of their own (see ``tests/kernels/conftest.py``)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


# A suite of its own in one test; minutes on a busy machine.
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_the_kernels_pass_their_tests():
    pytest.importorskip("triton")
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(TESTS / "kernels"),
            f"--ignore={TESTS / 'kernels' / 'test_ahead_of_time.py'}",
            "-p",
            "no:cacheprovider",
        ],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-5_000:]
