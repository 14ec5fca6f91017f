"""What the tests of ``make gpu`` share. They need no GPU and use none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

TIMING = {
    "kind": "timing",
    "op": "gram",
    "case": "a case",
    "form": "triton",
    "role": "ours",
    "median_seconds": 1.0,
    "quartiles_seconds": [0.9, 1.1],
    "rounds": 5,
    "host_seconds": 0.1,
    "flops": 0.0,
    "unit": "bf16",
    "bytes": 0.0,
}

CHECK = {
    "kind": "check",
    "op": "gram",
    "backend": "triton",
    "case": "a case",
    "what": "gram is right",
    "status": "passed",
    "detail": "",
}

DEVICE = {
    "kind": "device",
    "name": "NVIDIA Test 1",
    "description": {"driver": "1.2"},
    "versions": {"torch": "2"},
}


@pytest.fixture
def timing() -> Callable[..., dict[str, Any]]:
    """Return a function that makes timing rows."""
    return lambda **changes: {**TIMING, **changes}


@pytest.fixture
def check() -> Callable[..., dict[str, Any]]:
    """Return a function that makes check rows."""
    return lambda **changes: {**CHECK, **changes}


@pytest.fixture
def device_row() -> dict[str, Any]:
    """Return a device row."""
    return dict(DEVICE)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of steps on the CPU."""
    from bench.gpu.places import step_environment

    return step_environment("cpu", tmp_path_factory.mktemp("links"))


@pytest.fixture
def interpreter() -> None:
    """Skip a test where Triton's interpreter cannot run the kernels."""
    numpy = pytest.importorskip("numpy")
    triton = pytest.importorskip("triton")

    def release(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    if release(triton.__version__) <= (3, 6) and release(numpy.__version__) >= (2, 4):
        pytest.skip(
            f"triton {triton.__version__} interprets no loops with numpy {numpy.__version__}"
        )


@pytest.fixture
def rows_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``emit`` write to a file of this test, and return it."""
    from bench.gpu import rows

    path = tmp_path / "rows"
    monkeypatch.setenv(rows.VARIABLE, str(path))
    return path
