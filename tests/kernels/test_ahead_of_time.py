"""Every kernel, compiled ahead of time: what its machine code holds, and that the docs show it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
TABLE = SCRIPT.parents[2] / "docs" / "kernels.md"

SHARED_MEMORY_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes that a block may have; a kernel that asks for more compiles without a word."""


def run_script(*options: str) -> list:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-10_000:]
    return json.loads(ran.stdout)


def describe(result: dict) -> str:
    names = (result[key] for key in ("kernel", "example", "configuration"))
    return f"{', '.join(names)}, sm_{result['architecture']}"


# The first test waits for the compiler, which takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    results = run_script()
    assert results
    return results


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    names = [tuple(name) for name in run_script("--names")]
    assert len(set(names)) == len(names), "two specializations bear one name"
    found = [
        (*(result[key] for key in ("op", "kernel", "example", "configuration")), architecture)
        for result in compiled
        for architecture in [result["architecture"]]
    ]
    assert sorted(found) == sorted((*name, cc) for name in names for cc in SHARED_MEMORY_LIMIT)


def test_every_kernel_in_the_sources_is_compiled(compiled):
    """No kernel, and no configuration, is without an example."""
    sources = (SCRIPT.parents[2] / "kernels").glob("*.py")
    written = {
        name
        for path in sources
        for name in re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert written == {result["kernel"] for result in compiled}


def test_shared_memory_fits_the_chip(compiled):
    too_much = [
        f"{describe(result)}: {result['shared_memory']} bytes"
        for result in compiled
        if result["shared_memory"] > SHARED_MEMORY_LIMIT[result["architecture"]]
    ]
    assert too_much == []


def test_no_register_is_spilled(compiled):
    spilled = [describe(result) for result in compiled if result["stack"]]
    assert spilled == []


def test_matrix_kernels_use_tensor_cores(compiled):
    without = [describe(result) for result in compiled if result["tensor_cores"] is False]
    assert without == []


def test_aligned_rows_are_read_16_bytes_at_a_time(compiled):
    narrow = [describe(result) for result in compiled if result["wide_loads"] is False]
    assert narrow == []
    assert any(result["wide_loads"] for result in compiled)


def test_the_table_in_the_docs_names_every_kernel(compiled):
    """Registers may differ with Triton's version; the names may not."""
    rows = [
        tuple(cell.strip().strip("`") for cell in line.strip("|").split("|"))[:5]
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    expected = [
        (
            result["op"],
            result["kernel"],
            result["example"],
            result["configuration"],
            f"sm_{result['architecture']}",
        )
        for result in compiled
    ]
    assert rows == expected, "python tests/kernels/ahead_of_time.py --write"
