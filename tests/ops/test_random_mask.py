"""random_mask: one stream of bits on every backend."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyeditfast.backends import backend, explain
from pyeditfast.extension import extension_status, load_extension
from pyeditfast.reference.random_mask import philox_4x32_10
from pyeditfast.reference.random_mask import random_mask as reference_mask
from pyeditfast.reference.random_mask import random_uniform as reference_uniform

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.random_mask")

extension = load_extension()
needs_extension = pytest.mark.skipif(extension is None, reason=extension_status())

# The published test vectors of Random123 for Philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

SEEDS = st.integers(min_value=0, max_value=2**64 - 1)


def compiled_uniform(seed: int, numel: int, offset: int, threads: int) -> torch.Tensor:
    """Call the C++ form; NaN beforehand, so that an element it leaves out shows."""
    out = torch.full((numel,), float("nan"))
    extension.random_uniform(out.data_ptr(), numel, seed, offset, threads)
    return out


def compiled_mask(seed: int, ratio: float, numel: int, offset: int, threads: int) -> torch.Tensor:
    """Call the C++ form on bytes of 7, so that an element it leaves out shows."""
    out = torch.full((numel,), 7, dtype=torch.uint8)
    extension.random_mask(out.data_ptr(), numel, seed, ratio, offset, threads)
    return out


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_reference_gives_the_known_answers(counter, key, expected):
    words = philox_4x32_10(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(word.item() for word in words) == expected


@needs_extension
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_extension_gives_the_known_answers(counter, key, expected):
    assert extension.philox_4x32_10(*counter, *key) == expected


def test_uniform_is_the_word_folded_and_scaled():
    # The first and the third known answer of a zero counter and key.
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], dtype=np.uint32)
    # The first is below 2^31; the others fold to what is left to 2^32 − 1.
    folded = np.minimum(words, 0xFFFFFFFF - words).astype(np.float32)
    expected = folded * np.float32(4.6566127342e-10)
    assert reference_uniform(0, (4,)).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize("first", [0, 5, 2**30 - 3, 2**32 - 3, 2**60])
def test_an_element_has_a_word_of_the_block_of_four(name, first):
    seed = 0x123456789ABCDEF0
    blocks = torch.arange(first, first + 6)
    zero = torch.zeros_like(blocks)
    counter = (blocks & 0xFFFFFFFF, blocks >> 32, zero, zero)
    words = philox_4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))
    with backend(name):
        numbers = op.random_uniform(seed, (24,), 4 * first)
        for index, number in enumerate(numbers.tolist()):
            word = words[index % 4][index // 4].item()
            expected = np.float32(min(word, 0xFFFFFFFF - word)) * np.float32(4.6566127342e-10)
            assert number == expected, index
        for begin in range(1, 9):
            part = op.random_uniform(seed, (11,), 4 * first + begin)
            assert torch.equal(part, numbers[begin : begin + 11]), begin


@needs_extension
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x123456789ABCDEF0])
@pytest.mark.parametrize("numel", [1, 2, 15, 17, 1000, 65_537, 200_003])
def test_extension_equals_reference(seed, numel):
    expected = reference_uniform(seed, (numel,))
    expected_mask = (expected < np.float32(0.2)).to(torch.uint8)
    for threads in (1, 2, 3):
        assert torch.equal(compiled_uniform(seed, numel, 0, threads), expected), threads
        assert torch.equal(compiled_mask(seed, 0.2, numel, 0, threads), expected_mask), threads


@needs_extension
@pytest.mark.parametrize(
    "offset",
    [1, 2, 65_535, 2**31 - 3, 2**32 - 70_000, 2**34 - 70_001, 2**40 - 1, 2**63 - 1 - 140_001],
)
def test_extension_equals_reference_at_offsets(offset):
    numel = 140_001
    expected = reference_uniform(11, (numel,), offset)
    expected_mask = (expected < 0.5).to(torch.uint8)
    for threads in (1, 2, 3):
        assert torch.equal(compiled_uniform(11, numel, offset, threads), expected), threads
        assert torch.equal(compiled_mask(11, 0.5, numel, offset, threads), expected_mask), threads


@needs_extension
@settings(deadline=None, max_examples=50)
@given(
    seed=SEEDS,
    offset=st.integers(min_value=0, max_value=2**63 - 1 - 300),
    numel=st.integers(min_value=0, max_value=300),
)
def test_extension_equals_reference_for_any_seed(seed, offset, numel):
    expected = reference_uniform(seed, (numel,), offset)
    assert torch.equal(compiled_uniform(seed, numel, offset, 2), expected)


@needs_extension
def test_extension_leaves_the_bytes_around_its_output_alone():
    buffer = torch.full((40,), 7, dtype=torch.uint8)
    extension.random_mask(buffer.data_ptr() + 3, 33, 5, 0.5, 0, 1)
    assert buffer[:3].tolist() == [7] * 3
    assert buffer[36:].tolist() == [7] * 4
    assert set(buffer[3:36].tolist()) == {0, 1}


@needs_extension
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 0.5, 0, 1), "numel must be >= 0, got -1"),
        ((4, 0, 0.5, -2, 1), "got offset -2, numel 4"),
        ((4, 0, 0.5, 2**63 - 1, 1), "got offset 9223372036854775807, numel 4"),
        ((4, 0, 1.5, 0, 1), r"ratio must be in \[0, 1\], got 1.5"),
        ((4, 0, float("nan"), 0, 1), r"ratio must be in \[0, 1\], got nan"),
        ((4, 0, 0.5, 0, 0), "threads must be >= 1, got 0"),
    ],
)
def test_extension_refuses_bad_arguments(arguments, message):
    out = torch.empty(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        extension.random_mask(out.data_ptr(), *arguments)


@needs_extension
def test_extension_refuses_a_null_pointer():
    with pytest.raises(ValueError, match="out is a null pointer, but numel is 4"):
        extension.random_uniform(0, 4, 0, 0, 1)


def test_reference_chunks_join(monkeypatch):
    module = importlib.import_module("pyeditfast.reference.random_mask")
    uniform, mask = reference_uniform(3, (7, 31)), reference_mask(3, 0.3, (7, 31))
    for chunk in (10, 12, 1):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert torch.equal(reference_uniform(3, (7, 31)), uniform)
        assert torch.equal(reference_mask(3, 0.3, (7, 31)), mask)


TRITON_PROGRAM = """
    import sys

    import torch
    import triton
    import triton.language as tl


    @triton.jit
    def uniform(out, seed, block, BLOCKS: tl.constexpr):
        lane = tl.arange(0, BLOCKS)
        first, second, third, fourth = tl.rand4x(seed, block + lane.to(tl.int64))
        tl.store(out + 4 * lane, first)
        tl.store(out + 4 * lane + 1, second)
        tl.store(out + 4 * lane + 2, third)
        tl.store(out + 4 * lane + 3, fourth)


    results = {}
    for seed, block in eval(sys.argv[2]):
        out = torch.empty(256)
        uniform[(1,)](out, seed, block, BLOCKS=64)
        results[f"{seed} {block}"] = out
    from safetensors.torch import save_file

    save_file(results, sys.argv[1])
"""


def test_equals_triton(tmp_path):
    pytest.importorskip("triton")
    from safetensors.torch import load_file

    cases = [
        (seed, block)
        for seed in (0, 1, 2**31, 2**32 + 7, 2**63 - 1, 2**63 + 12345, 2**64 - 1)
        for block in (0, 1000, 2**31 - 25, 2**32 - 25, 2**40 + 1, 2**60)
    ]
    program = tmp_path / "triton_uniform.py"
    program.write_text(textwrap.dedent(TRITON_PROGRAM))
    result = tmp_path / "uniform.safetensors"
    subprocess.run(
        [sys.executable, str(program), str(result), repr(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    triton_uniform = load_file(result)
    assert len(triton_uniform) == len(cases)
    for seed, block in cases:
        ours = op.random_uniform(seed, (256,), 4 * block)
        assert torch.equal(triton_uniform[f"{seed} {block}"], ours), (seed, block)
        assert torch.equal(reference_uniform(seed, (256,), 4 * block), ours), (seed, block)


@pytest.mark.parametrize("name", ["auto", "reference", "torch", "cpp"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (129, 1023), (0,), (4, 0, 2)])
def test_op_equals_reference(name, shape):
    if name == "cpp" and extension is None:
        pytest.skip(extension_status())
    with backend(name):
        mask = op.random_mask(9, 0.25, shape)
        uniform = op.random_uniform(9, shape, 77)
    assert mask.dtype == torch.bool
    assert mask.shape == shape
    assert torch.equal(mask, reference_mask(9, 0.25, shape))
    assert uniform.dtype == torch.float32
    assert torch.equal(uniform, reference_uniform(9, shape, 77))


def test_backend_on_the_cpu_and_elsewhere():
    expected = "torch" if extension is None else "cpp"
    assert explain("random_mask", op.CANDIDATES, torch.device("cpu")).backend == expected
    cuda = explain("random_mask", op.CANDIDATES, torch.device("cuda"))
    assert cuda.backend == "torch"
    assert "the C++ form runs on the CPU, not on cuda" in cuda.reason


def test_device_argument_and_default_device():
    assert op.random_mask(0, 0.5, (3,), device="cpu").device.type == "cpu"
    with torch.device("meta"):
        assert op.random_mask(0, 0.5, (3,)).device.type == "meta"
        assert op.random_mask(0, 0.5, (3,), device="cpu").device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu():
    for offset in (0, 2**32 - 70_000, 2**34 - 70_001):
        cuda = op.random_uniform(2**63 + 5, (140_001,), offset, device="cuda")
        assert torch.equal(cuda.cpu(), op.random_uniform(2**63 + 5, (140_001,), offset))
    cuda_mask = op.random_mask(4, 0.2, (300, 301), device="cuda")
    assert torch.equal(cuda_mask.cpu(), op.random_mask(4, 0.2, (300, 301)))


def test_parts_equal_the_whole():
    whole = op.random_uniform(21, (1000,))
    for size in (250, 1, 125):
        parts = [op.random_uniform(21, (size,), offset) for offset in range(0, 1000, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_mask_is_uniform_below_ratio():
    ratio = 0.2
    below = op.random_uniform(5, (100, 101)) < torch.tensor(ratio, dtype=torch.float32)
    assert torch.equal(op.random_mask(5, ratio, (100, 101)), below)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_a_number_equal_to_the_ratio_is_not_below_it(name):
    with backend(name):
        numbers = op.random_uniform(5, (50,))
        for index, number in enumerate(numbers.tolist()):
            assert not op.random_mask(5, number, (50,))[index]
            assert op.random_mask(5, min(1.0, number + 1e-6), (50,))[index]


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.5, 0.97])
def test_share_of_true(ratio):
    numel = 1 << 20
    share = op.random_mask(1234, ratio, (1024, 1024)).double().mean().item()
    # The bits are fixed by the seed; five standard deviations of a binomial share.
    assert abs(share - ratio) < 5 * (ratio * (1 - ratio) / numel) ** 0.5


def test_uniform_moments_and_range():
    numbers = op.random_uniform(99, (1 << 20,)).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean().item() - 1 / 2) < 5 * (1 / 12 / numbers.numel()) ** 0.5
    assert abs(numbers.var().item() - 1 / 12) < 5 * (1 / 180 / numbers.numel()) ** 0.5


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_ratio_zero_and_one(name):
    with backend(name):
        assert not op.random_mask(3, 0, (1000, 100)).any()
        assert op.random_mask(3, 1, (1000, 100)).all()


@settings(deadline=None, max_examples=50)
@given(first=SEEDS, second=SEEDS)
def test_different_seeds_give_different_masks(first, second):
    same = torch.equal(op.random_mask(first, 0.5, (256,)), op.random_mask(second, 0.5, (256,)))
    assert same == (first == second)


BAD_ARGUMENTS = [
    ((-1, 0.5, (2,)), ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ((2**64, 0.5, (2,)), ValueError, "got 18446744073709551616"),
    ((1.5, 0.5, (2,)), TypeError, "seed must be an integer, got 1.5"),
    ((True, 0.5, (2,)), TypeError, "seed must be an integer, got True"),
    ((0, -0.1, (2,)), ValueError, r"ratio must be in \[0, 1\], got -0.1"),
    ((0, 1.0000001, (2,)), ValueError, "got 1.0000001"),
    ((0, float("nan"), (2,)), ValueError, "got nan"),
    ((0, "half", (2,)), TypeError, "ratio must be a number, got 'half'"),
    ((0, 0.5, (2, -3)), ValueError, r"shape must not hold a negative size, got \(2, -3\)"),
    ((0, 0.5, (2, 3.0)), TypeError, r"shape must hold integers, got \(2, 3.0\)"),
    ((0, 0.5, 7), TypeError, "shape must be a sequence of integers, got 7"),
]


@pytest.mark.parametrize("function", [op.random_mask, reference_mask])
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


@pytest.mark.parametrize("function", [op.random_uniform, reference_uniform])
@pytest.mark.parametrize(
    ("offset", "error", "message"),
    [
        (-1, ValueError, r"got offset -1 for shape \(4,\)"),
        (2**63 - 4, ValueError, "got offset 9223372036854775804"),
        (0.5, TypeError, "offset must be an integer, got 0.5"),
    ],
)
def test_bad_offsets(function, offset, error, message):
    with pytest.raises(error, match=message):
        function(0, (4,), offset)


def test_reference_imports_only_torch():
    source = Path(importlib.import_module("pyeditfast.reference.random_mask").__file__).read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    allowed = (
        "from __future__",
        "import math",
        "from collections.abc",
        "import torch",
        "from torch",
    )
    assert all(line.startswith(allowed) for line in imports), imports
