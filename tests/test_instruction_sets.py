"""The C++ sources give the same bits on every processor."""

from __future__ import annotations

import concurrent.futures
import platform
from pathlib import Path

import pytest
from native_driver import build_driver, release_flags, run_driver

ONE_INSTRUCTION_SET = "-DPYEDITFAST_ONE_INSTRUCTION_SET"
# With the instructions for fused multiply-add, which must not be used.
BUILDS = {
    "chosen by the loader": (),
    "portable": (ONE_INSTRUCTION_SET,),
    "avx2": (ONE_INSTRUCTION_SET, "-mavx2", "-mfma", "-mf16c"),
    "avx512f": (ONE_INSTRUCTION_SET, "-mavx512f", "-mfma"),
    "x86-64-v4": (ONE_INSTRUCTION_SET, "-march=x86-64-v4"),
}
NEEDED = {
    "avx512f": {"avx512f"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "bmi2", "f16c"},
}


def processor_flags() -> set[str]:
    """Return the names of what the processor can do, as Linux gives them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits(tmp_path: Path):
    able = processor_flags()
    if platform.machine() != "x86_64" or not {"avx2", "f16c", "fma"} <= able:
        pytest.skip("this processor has no other instruction set to compare with")
    names = [name for name in BUILDS if NEEDED.get(name, set()) <= able]

    def printed(name: str) -> str:
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        return run_driver(build_driver(folder, *release_flags(), *BUILDS[name]))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outputs = dict(zip(names, pool.map(printed, names), strict=True))
    expected = outputs["portable"].splitlines()
    assert len(expected) > 500
    for name, output in outputs.items():
        assert output.splitlines() == expected, name
