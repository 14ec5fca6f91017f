"""The C++ sources under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_driver import ROOT, build_driver, build_program, run_driver, works

# Sanitizers do not bear functions that the loader chooses.
FLAGS = (
    *("-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra"),
    *("-fno-sanitize-recover=all", "-DPYEDITFAST_ONE_INSTRUCTION_SET"),
)


def sanitized(folder: Path, checks: str) -> Path:
    """Return the driver built with the checks, or skip."""
    if not works(folder, f"-fsanitize={checks}"):
        pytest.skip(f"this compiler or machine lacks -fsanitize={checks}")
    return build_driver(folder, *FLAGS, f"-fsanitize={checks}")


@pytest.mark.slow
def test_no_access_outside_and_no_undefined_behaviour(tmp_path: Path):
    program = sanitized(tmp_path, "address,undefined")
    assert len(run_driver(program).splitlines()) > 500
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        run_driver(program, "overrun")


@pytest.mark.slow
def test_no_race_between_threads(tmp_path: Path):
    assert len(run_driver(sanitized(tmp_path, "thread")).splitlines()) > 500


@pytest.mark.slow
def test_cuda_kernels_stay_inside_their_buffers(tmp_path: Path):
    checks = "-fsanitize=address,undefined"
    if not works(tmp_path, checks):
        pytest.skip(f"this compiler or machine lacks {checks}")
    emulation = ROOT / "tests" / "csrc"
    sources = sorted(path for path in (ROOT / "csrc").glob("*.cpp") if "bindings" not in path.stem)
    sources += sorted((ROOT / "csrc").glob("*.cu"))
    sources += [emulation / name for name in ("block_executor.cpp", "cuda_driver.cpp")]
    program = build_program(tmp_path, sources, *FLAGS, f"-I{emulation}", checks)
    assert len(run_driver(program).splitlines()) > 130
    for argument in ("overrun", "overrun_decode"):
        with pytest.raises(AssertionError, match="heap-buffer-overflow"):
            run_driver(program, argument)
