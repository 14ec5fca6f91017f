"""The block executor finds what is wrong with a kernel, and says where."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_driver import ROOT, build_program, run_driver

FAULTS = {
    "out_of_bounds": "thread 63 of block (0, 0, 0): element 64 of a shared array of 64",
    "negative_index": "thread 0 of block (0, 0, 0): element -4 of a shared array of 61",
    "takes_too_much": "it takes 784 bytes of shared memory, of 768",
    "asks_for_too_much": "invalid configuration argument: 102400 bytes of shared memory a block",
    "reads_before_the_barrier": "thread 0 of block (0, 0, 0): it reads shared memory that nobody",
    "writes_what_others_still_read": "thread 0 of block (0, 0, 0): a race: it writes shared byte 0,"
    " which thread 63 touches between the same barriers",
    "writes_twice": "thread 1 of block (0, 0, 0): a race: it writes shared byte 0, which thread 0",
    "adds_while_others_write": "thread 1 of block (0, 0, 0): a race: it adds to shared byte 0",
    "reads_what_nobody_wrote": "thread 5 of block (0, 0, 0): it reads shared memory that nobody",
    "some_skip_the_barrier": "the threads diverge: 42 at a barrier (first thread 1 of block "
    "(0, 0, 0)), 22 ended (first thread 0 of block (0, 0, 0)), and none can go on",
    "some_wait_once_more": "the threads diverge: 32 at a barrier (first thread 0",
    "lanes_skip_a_shuffle": "the threads diverge: 14 in an exchange of its warp (first thread 0",
    "lanes_at_different_operations": "thread 7 of block (0, 0, 0): it is at ballot, others of its "
    "warp at shuffle_xor",
    "misaligned_load": "thread 0 of block (0, 0, 0): a load of 16 bytes that is not aligned",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [ROOT / "tests" / "csrc" / name for name in ("executor_faults", "block_executor")]
    return build_program(
        tmp_path_factory.mktemp("executor"),
        [path.with_suffix(".cpp") for path in sources],
        *("-std=c++17", "-O1", "-Wall", "-Wextra", f"-I{ROOT / 'tests' / 'csrc'}"),
    )


@pytest.mark.parametrize("kernel", ["sums_over_all_threads", "counts"])
def test_a_kernel_without_fault_passes(program, kernel):
    assert run_driver(program, kernel) == "passed\n"


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_named(program, kernel):
    message = run_driver(program, kernel)
    assert message.startswith("the kernel (2 blocks) failed: ")
    assert FAULTS[kernel] in message
