"""The compiled module is optional: built where possible, missed by name where not."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyeditfast.extension import extension_status, load_extension

ROOT = Path(__file__).resolve().parents[1]
BUILD_INPUTS = (
    *("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"),
    *("csrc", "pyeditfast", "kernels"),
)

needs_build_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("setuptools", "cmake", "pybind11")),
    reason="setuptools, cmake and pybind11 are needed to build",
)


def run_python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYEDITFAST_BUILD_CSRC", "CXX")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the build reads, without compiled files."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "_csrc_missing.txt")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "bench" / "published", tmp_path / "bench" / "published", ignore=ignore)
    return tmp_path


def build(source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # The CUDA kernels take most of the time, and tests/cuda compiles them.
    variables = {"CMAKE_ARGS": "-DPYEDITFAST_CUDA=OFF", **variables}
    return run_python("setup.py", "build_ext", "--inplace", cwd=source, **variables)


def compiled_files(source: Path) -> list[str]:
    return [path.name for path in (source / "pyeditfast").glob("_csrc*") if path.suffix != ".txt"]


def status_of(source: Path) -> str:
    """Ask a new process about the copy.

    ``-S`` leaves out installed packages: an editable install would add its own compiled module to
    the copy. The bare parent module stands in for the package, which needs them.
    """
    program = (
        "import sys, types; package = types.ModuleType('pyeditfast'); "
        "package.__path__ = ['pyeditfast']; sys.modules['pyeditfast'] = package; "
        "from pyeditfast.extension import extension_status, load_extension; "
        "print(load_extension() is not None, extension_status())"
    )
    completed = run_python("-S", "-c", program, cwd=source)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


HIDDEN = """
import importlib
import logging
import sys

import torch


class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "pyeditfast._csrc":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hide())
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
import pyeditfast
from pyeditfast.extension import extension_status, load_extension

assert load_extension() is None
op = importlib.import_module("pyeditfast.ops.random_mask")
print("share", op.random_mask(7, 0.5, (64, 64)).double().mean().item())
print("status", extension_status())
"""


def test_everything_works_with_the_extension_hidden():
    completed = run_python("-c", HIDDEN, cwd=ROOT)
    assert completed.returncode == 0, completed.stderr
    from pyeditfast.reference.random_mask import random_mask

    share = random_mask(7, 0.5, (64, 64)).double().mean().item()
    assert f"share {share}" in completed.stdout
    # The fallback is logged with its name and its reason.
    assert "random_mask on cpu: torch (cpp not used: the compiled module" in completed.stdout
    assert "status the compiled module pyeditfast._csrc is missing: " in completed.stdout


def test_importing_loads_no_extension_and_logs_nothing():
    program = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG); "
        "import pyeditfast.extension; assert 'pyeditfast._csrc' not in sys.modules"
    )
    completed = run_python("-c", program, cwd=ROOT)
    assert completed.returncode == 0, completed.stderr
    assert "pyeditfast" not in completed.stderr


def test_status_describes_the_extension_at_hand():
    module = load_extension()
    if module is None:
        assert "is missing: " in extension_status() or "does not load: " in extension_status()
        return
    info = module.build_info()
    assert set(info) == {
        "version",
        "compiler",
        "build_type",
        "cuda",
        "cuda_version",
        "cuda_architectures",
        "cuda_emulated",
        "cuda_note",
    }
    assert info["compiler"] in extension_status()
    assert ("no CUDA" in extension_status()) == (not info["cuda"])
    assert extension_status().endswith(("it runs on torch's threads", "it runs on its own threads"))


def test_a_broken_extension_is_named_and_not_fatal(source):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (source / "pyeditfast" / f"_csrc{suffix}").write_bytes(b"not a shared library")
    assert status_of(source).startswith("False the compiled module pyeditfast._csrc does not load:")


@needs_build_tools
def test_build_without_a_compiler_succeeds_and_says_so(source):
    stale = source / "pyeditfast" / f"_csrc{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    stale.write_bytes(b"from an earlier build")
    completed = build(source, CXX="/nonexistent/c++")
    assert completed.returncode == 0, completed.stderr
    assert "WARNING: pyeditfast._csrc was not built: no C++ compiler" in completed.stderr
    assert "/nonexistent/c++" in completed.stderr
    assert compiled_files(source) == []
    status = status_of(source)
    assert status.startswith("False the compiled module pyeditfast._csrc is missing: ")
    assert "/nonexistent/c++" in status


@needs_build_tools
def test_a_compiler_that_fails_is_reported_with_cmakes_words(source):
    fake = source / "fake-compiler"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    completed = build(source, CXX=str(fake))
    assert completed.returncode == 0, completed.stderr
    assert "was not built: CMake could not configure the build: " in completed.stderr
    assert "fake-compiler" in completed.stderr
    assert compiled_files(source) == []


@needs_build_tools
def test_a_source_that_does_not_compile_is_reported(source):
    if load_extension() is None:
        pytest.skip(extension_status())
    # The other sources would compile, which takes time and proves nothing here.
    for path in (source / "csrc").glob("*.cpp"):
        path.write_text("this is no C++;\n" if path.stem == "random_mask" else "")
    completed = build(source)
    assert completed.returncode == 0, completed.stderr
    assert "was not built: CMake could not compile: " in completed.stderr
    assert "random_mask.cpp" in completed.stderr
    assert compiled_files(source) == []


@needs_build_tools
def test_the_switch_makes_failure_fatal_or_leaves_the_module_out(source):
    fatal = build(source, CXX="/nonexistent/c++", PYEDITFAST_BUILD_CSRC="1")
    assert fatal.returncode != 0
    assert "ERROR: pyeditfast._csrc was not built: no C++ compiler" in fatal.stderr

    stale = source / "pyeditfast" / f"_csrc{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    stale.write_bytes(b"from an earlier build")
    skipped = build(source, PYEDITFAST_BUILD_CSRC="0")
    assert skipped.returncode == 0, skipped.stderr
    assert compiled_files(source) == []
    assert "left out on request (PYEDITFAST_BUILD_CSRC=0)" in skipped.stderr
    assert "left out on request" in status_of(source)

    unknown = build(source, PYEDITFAST_BUILD_CSRC="maybe")
    assert unknown.returncode != 0
    assert "PYEDITFAST_BUILD_CSRC must be auto, 0 or 1, got 'maybe'" in unknown.stderr


@needs_build_tools
def test_build_with_a_compiler(source):
    if load_extension() is None:
        pytest.skip(extension_status())
    (source / "pyeditfast" / "_csrc_missing.txt").write_text("an earlier reason\n")
    completed = build(source, PYEDITFAST_BUILD_CSRC="1")
    assert completed.returncode == 0, completed.stderr
    assert len(compiled_files(source)) == 1
    assert not (source / "pyeditfast" / "_csrc_missing.txt").exists()
    assert status_of(source).startswith("True the compiled module pyeditfast._csrc was built with ")


def installed_wheel(source: Path, **variables: str) -> Path:
    """Make a wheel of the copy, with the build tools at hand, and install it to a folder."""

    def pip(*arguments: str) -> None:
        completed = run_python(
            *("-m", "pip", "--disable-pip-version-check", *arguments, "--no-deps", "--no-index"),
            cwd=source,
            CMAKE_ARGS="-DPYEDITFAST_CUDA=OFF",
            **variables,
        )
        assert completed.returncode == 0, completed.stdout[-2000:] + completed.stderr[-2000:]

    pip("wheel", ".", "--no-build-isolation", "--wheel-dir", "wheels")
    (wheel,) = (source / "wheels").glob("*.whl")
    pip("install", "--target", "installed", str(wheel))
    return source / "installed"


def needed_libraries(module: Path) -> set[str]:
    printed = subprocess.run(
        ["readelf", "-d", str(module)], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", printed))


@needs_build_tools
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_a_wheel_is_whole_and_bound_to_no_torch(source):
    if load_extension() is None:
        pytest.skip(extension_status())
    tuned = Path("tuned_configs", "nvidia-test-1.json")
    (source / "kernels" / tuned.parent).mkdir(exist_ok=True)
    (source / "kernels" / tuned).write_text("{}")
    installed = installed_wheel(source, PYEDITFAST_BUILD_CSRC="1")
    assert (installed / "pyeditfast_kernels" / tuned).exists()
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"pyeditfast", "pyeditfast_kernels", "pyeditfast_published", "bin"}
    for name, sources in (("pyeditfast", "pyeditfast"), ("pyeditfast_kernels", "kernels")):
        assert {path.relative_to(ROOT / sources) for path in (ROOT / sources).rglob("*.py")} == {
            path.relative_to(installed / name) for path in (installed / name).rglob("*.py")
        }
    (module,) = (installed / "pyeditfast").glob("_csrc*.so")
    system = {"libc.so.6", "libdl.so.2", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0"}
    system |= {"librt.so.1", "libstdc++.so.6"}
    others = needed_libraries(module) - system
    assert all(name.startswith("ld-linux") for name in others), others
    assert status_of(installed).startswith("True ")


@needs_build_tools
def test_a_wheel_without_a_compiler_says_what_is_missing(source):
    installed = installed_wheel(source, CXX="/nonexistent/c++")
    assert compiled_files(installed) == []
    assert "no C++ compiler: CXX names '/nonexistent/c++'" in status_of(installed)
