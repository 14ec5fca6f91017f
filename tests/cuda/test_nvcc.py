"""Every CUDA kernel, compiled by nvcc: no warnings, no spills, and as the docs show it."""

from __future__ import annotations

import importlib.util
import re

import nvcc_figures
import pytest

pytestmark = [
    pytest.mark.skipif(nvcc_figures.nvcc() is None, reason="no nvcc"),
    pytest.mark.timeout(900),
]

MOST_REGISTERS = 65536
"""Of a multiprocessor: a block with more cannot be launched."""


@pytest.fixture(scope="module")
def compiled() -> list[nvcc_figures.Figures]:
    found = nvcc_figures.all_figures()
    assert {one.file for one in found} == {source.name for source in nvcc_figures.SOURCES}
    return found


def test_nothing_is_spilled(compiled):
    assert [one for one in compiled if one.spilled or one.stack] == []


@pytest.mark.skipif(
    nvcc_figures.disassembler() is None and importlib.util.find_spec("triton") is None,
    reason="no cuobjdump",
)
def test_what_reads_much_reads_16_bytes_at_a_time(compiled):
    reading = [one for one in compiled if one.kernel.startswith(("count_whole", "count_digit"))]
    assert len(reading) == 6 * len(nvcc_figures.ARCHITECTURES)
    assert [one for one in reading if not one.wide_loads] == []


@pytest.mark.skipif(
    nvcc_figures.disassembler() is None and importlib.util.find_spec("triton") is None,
    reason="no cuobjdump",
)
def test_decoding_loads_16_bytes_and_multiplies_16_bits_on_tensor_cores(compiled):
    aligned = [one for one in compiled if re.match(r"multiply_memories<\d, true>", one.kernel)]
    assert len(aligned) == 3 * len(nvcc_figures.ARCHITECTURES)
    assert [one for one in aligned if not one.wide_loads] == []
    assert [one for one in aligned if one.tensor_cores != (one.kernel[18] != "0")] == []


def test_two_blocks_of_256_threads_of_a_product_fit(compiled):
    large = [one for one in compiled if one.kernel.startswith("multiply_memories")]
    assert large and max(one.registers for one in large) * 512 <= MOST_REGISTERS


def test_the_table_in_the_docs_names_every_kernel(compiled):
    """Figures may differ with the compiler's version; the names may not."""

    def names(lines):
        return [tuple(line.split("|")[1:4]) for line in lines if line.startswith("| `")]

    written = nvcc_figures.TABLE.read_text(encoding="utf-8").splitlines()
    assert names(written) == names(nvcc_figures.rows(compiled)), (
        "python tests/cuda/nvcc_figures.py --write"
    )


def test_a_warning_is_an_error(tmp_path):
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void kernel() { int unused; }\n")
    with pytest.raises(RuntimeError, match="unused"):
        nvcc_figures.compile_one(source, "80")
