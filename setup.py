"""Builds the compiled module ``pyeditfast._csrc`` with CMake; everything else is in pyproject.toml.

The environment variable ``PYEDITFAST_BUILD_CSRC`` says what happens to the compiled module:
``auto`` (the default) builds it where a C++ compiler is found and otherwise installs without it,
saying what is missing; ``1`` makes a failure fatal; ``0`` leaves it out.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SWITCH = "PYEDITFAST_BUILD_CSRC"
# Why there is no compiled module; pyeditfast.extension reads it.
REASON_FILE = "_csrc_missing.txt"


class BuildError(Exception):
    """The compiled module cannot be built; the message says what is missing."""


def build_switch() -> str:
    """Return ``auto``, ``1`` or ``0``, or stop the build on anything else."""
    value = os.environ.get(SWITCH, "").strip() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{SWITCH} must be auto, 0 or 1, got {value!r}")
    return value


def find_tool(name: str, folder_attribute: str) -> str | None:
    """Return the program that the Python package ``name`` ships, else the one on the PATH."""
    try:
        package = importlib.import_module(name)
    except ImportError:
        return shutil.which(name)
    folder = getattr(package, folder_attribute, None)
    return (shutil.which(name, path=str(folder)) if folder else None) or shutil.which(name)


def summarize_cmake_error(output: str) -> str:
    """Return CMake's first error as one line, or the last line of its output."""
    match = re.search(r"CMake Error[^\n]*:\n(.+?)(?:\n\n\n|\n\S|\Z)", output, re.DOTALL)
    if match:
        return " ".join(match.group(1).split())[:400]
    failed = [line.strip() for line in output.splitlines() if "error:" in line.lower()]
    lines = failed or output.strip().splitlines()[-1:] or ["no output"]
    return lines[0][:400]


def run_cmake(command: list[str], step: str) -> None:
    """Run one CMake command, show its output, and raise ``BuildError`` when it fails."""
    print(shlex.join(command), flush=True)
    completed = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    print(completed.stdout, flush=True)
    if completed.returncode != 0:
        raise BuildError(f"CMake could not {step}: {summarize_cmake_error(completed.stdout)}")


class CMakeBuild(build_ext):
    """Builds ``pyeditfast._csrc`` with CMake, or says loudly why it does not."""

    def run(self) -> None:
        switch = build_switch()
        # Noted here, since the base class clears it while it builds.
        self._writes_source = bool(self.inplace)
        if switch == "0":
            self._leave_out(f"it was left out on request ({SWITCH}=0)")
            return
        try:
            super().run()
        except BuildError as error:
            if switch == "1":
                raise SystemExit(
                    f"pyeditfast: ERROR: pyeditfast._csrc was not built: {error} ({SWITCH}=1)"
                ) from error
            self._leave_out(str(error).rstrip("."))
            return
        for folder in self._package_folders():
            (folder / REASON_FILE).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise BuildError("CMake was not found (neither the Python package cmake nor a program)")
        if importlib.util.find_spec("pybind11") is None:
            raise BuildError("the Python package pybind11 is not installed")
        compiler = shlex.split(os.environ.get("CXX", ""))
        if compiler and shutil.which(compiler[0]) is None:
            raise BuildError(f"no C++ compiler: CXX names {compiler[0]!r}, which cannot be run")

        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = (Path(self.build_temp) / "csrc").resolve()
        work.mkdir(parents=True, exist_ok=True)
        # A cache of another compiler, CMake or source folder would be used without a word.
        (work / "CMakeCache.txt").unlink(missing_ok=True)
        pybind11 = importlib.import_module("pybind11")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(work),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYEDITFAST_VERSION={self.distribution.get_version()}",
            f"-DPYEDITFAST_OUTPUT_DIR={module.parent}",
        ]
        ninja = find_tool("ninja", "BIN_DIR")
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        run_cmake(configure, "configure the build")
        run_cmake([cmake, "--build", str(work), "--config", "Release", "--parallel"], "compile")
        if not module.is_file():
            raise BuildError(f"CMake ran, but did not write {module.name}")

    def _package_folders(self) -> list[Path]:
        """Return the package folders that this build writes to: its own, and the source's."""
        folders = [Path(self.build_lib) / "pyeditfast"]
        if self._writes_source:
            folders.append(ROOT / "pyeditfast")
        return folders

    def _leave_out(self, reason: str) -> None:
        """Go on without the module, leaving the reason and no module of an earlier build."""
        pattern = "_csrc" + (".*" if os.name == "nt" else ".*so")
        for folder in self._package_folders():
            for stale in folder.glob(pattern):
                stale.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REASON_FILE).write_text(reason + "\n", encoding="utf-8")
        # Without this, the install would look for the file that was not built.
        self.extensions = []
        self.distribution.ext_modules = []
        print(
            f"pyeditfast: WARNING: pyeditfast._csrc was not built: {reason}. "
            "The package works without it, with slower torch code. "
            f"{SWITCH}=1 makes this an error, {SWITCH}=0 leaves the module out.",
            file=sys.stderr,
            flush=True,
        )


def packages_below(name: str, folder: str) -> list[str]:
    """Return the package ``name`` that lives in ``folder``, and its subpackages."""
    return [name, *(f"{name}.{child}" for child in find_packages(str(ROOT / folder)))]


setup(
    packages=[
        *packages_below("pyeditfast", "pyeditfast"),
        *packages_below("pyeditfast_kernels", "kernels"),
        *packages_below("pyeditfast_published", "bench/published"),
    ],
    package_dir={
        "pyeditfast_kernels": "kernels",
        "pyeditfast_published": "bench/published",
    },
    package_data={
        "pyeditfast": ["py.typed", "data/*.json", "demo/*.json"],
        "pyeditfast_kernels": ["tuned_configs/*.json"],
    },
    ext_modules=[Extension("pyeditfast._csrc", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
