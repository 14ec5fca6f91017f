"""Builds ``csrc`` without its bindings, together with ``tests/csrc/driver.cpp``."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT_OF_THE_DRIVER = {"PATH": os.environ.get("PATH", "")}


def compiler() -> list[str]:
    """Return the C++ compiler as a command, or skip."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in (named, ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    pytest.skip("no C++ compiler")


def release_flags() -> list[str]:
    """Return the flags of the C++ sources that CMakeLists.txt names for GCC and Clang."""
    text = (ROOT / "CMakeLists.txt").read_text()
    match = re.search(r"\$<\$<COMPILE_LANGUAGE:CXX>:(-Wall [^>]*)>", text)
    assert match, "CMakeLists.txt names no flags for GCC and Clang"
    return ["-std=c++17", "-O3", "-pthread", *match.group(1).split()]


def works(folder: Path, *flags: str) -> bool:
    """Say whether a program compiled with ``flags`` runs here."""
    source, program = folder / "try.cpp", folder / "try"
    source.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
    built = subprocess.run([*compiler(), *flags, str(source), "-o", str(program)])
    if built.returncode != 0:
        return False
    ran = subprocess.run([str(program)], env=ENVIRONMENT_OF_THE_DRIVER)
    return ran.returncode == 0


def build_driver(folder: Path, *flags: str) -> Path:
    """Compile all C++ sources but the bindings, and the driver, warnings being errors."""
    sources = sorted(path for path in (ROOT / "csrc").glob("*.cpp") if "bindings" not in path.stem)
    return build_program(folder, [*sources, ROOT / "tests" / "csrc" / "driver.cpp"], *flags)


def build_program(folder: Path, sources: Sequence[Path], *flags: str) -> Path:
    """Compile some sources to a program, warnings being errors. A ``.cu`` file counts as C++."""
    program = folder / "driver"
    command = [*compiler(), *flags, "-Werror", f"-I{ROOT / 'csrc'}", "-x", "c++"]
    command += [*map(str, sources), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-5000:]
    return program


def run_driver(program: Path, *arguments: str) -> str:
    """Run the driver and return what it prints."""
    ran = subprocess.run(
        [str(program), *arguments], env=ENVIRONMENT_OF_THE_DRIVER, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-5000:]
    # The block executor announces its fibers' stacks to AddressSanitizer, which says this anyway.
    said = [line for line in ran.stderr.splitlines() if "makecontext/swapcontext" not in line]
    assert said == []
    return ran.stdout
