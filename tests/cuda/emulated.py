"""Builds the compiled module with its CUDA kernels emulated on the CPU (``tests/csrc``)."""

from __future__ import annotations

import fcntl
import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulated"


def run(*command: str) -> None:
    """Run a build command, or fail with what it printed."""
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]


def build() -> Path:
    """Build the module, once for all processes that want it, and return its path; or skip."""
    for name in ("cmake", "pybind11"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the Python package {name} is needed to build the emulated kernels")
    import cmake
    import pybind11

    FOLDER.mkdir(parents=True, exist_ok=True)
    program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(
            *(program, "-S", str(ROOT), "-B", str(FOLDER), "-DCMAKE_BUILD_TYPE=Release"),
            "-DPYEDITFAST_EMULATED_CUDA=ON",
            "-DPYEDITFAST_VERSION=emulated",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYEDITFAST_OUTPUT_DIR={FOLDER / 'module'}",
        )
        run(program, "--build", str(FOLDER), "--parallel", "2")
    return FOLDER / "module" / f"_csrc{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def load(path: Path) -> ModuleType:
    """Load the module beside the one that the package may have loaded."""
    loader = importlib.machinery.ExtensionFileLoader("_csrc", str(path))
    spec = importlib.util.spec_from_loader("_csrc", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
