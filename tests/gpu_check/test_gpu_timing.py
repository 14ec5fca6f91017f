"""Timing: rounds, restored inputs, and ceilings, with a clock of the host's in place of events."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.gpu import rows, sanitizer
from bench.gpu.case import Case
from bench.gpu.clock import HostClock, measure
from bench.gpu.timing import forms, input_sets, time_case, time_form

CPU = torch.device("cpu")


class FakeClock:
    """Every call takes as many seconds as the list says, then one second."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.prepared: list[float] = []
        self.waits = 0

    def prepare(self, host_seconds: float) -> None:
        self.prepared.append(host_seconds)

    def time(self, call):
        call()
        elapsed = self.seconds.pop(0) if self.seconds else 1.0
        return lambda: elapsed, 0.25

    def wait(self) -> None:
        self.waits += 1


def test_median_and_quartiles_without_the_first_calls():
    clock = FakeClock([99.0, 5.0, 1.0, 4.0, 2.0, 3.0])
    calls, befores = [], []
    found = measure(clock, calls.append, befores.append, budget=1e-9)
    # Two calls to warm up, one to see how long it takes, three at the least.
    assert found.rounds == 3 and calls == [0, 1, 2, 0, 1, 2] == befores
    assert (found.median, found.quartiles, found.host) == (4.0, (2.5, 4.5), 0.25)
    assert clock.prepared == [0.25] * 3 and clock.waits == 3


def test_the_budget_gives_the_rounds():
    found = measure(HostClock(), lambda _: None, lambda _: None, budget=10.0)
    assert found.rounds == 50


def adding(**changes) -> Case:
    """Return a case that adds one to x in place."""

    def add(inputs):
        return {"x": inputs["x"].add_(1.0)}

    case = Case(
        op="gram",
        name="one more",
        inputs=lambda device, generator: {"x": torch.rand(3, generator=generator)},
        run=add,
        plain={"again": add},
        writes=("x",),
        bytes=24.0,
        backends=("torch",),
        timed=True,
    )
    return dataclasses.replace(case, **changes)


def test_what_a_form_writes_is_restored_before_every_call():
    case = adding()
    sets = input_sets(case, CPU)
    starts = [inputs["x"].clone() for inputs in sets]
    assert len(sets) == 2 and not torch.equal(*starts)
    seen = []

    def form(inputs):
        seen.append(inputs["x"].clone())
        return case.run(inputs)

    time_form(case, form, sets, FakeClock([]), 0.0)
    assert len(seen) == 6
    for number, found in enumerate(seen):
        assert torch.equal(found, starts[(0, 1, 2, 0, 1, 2)[number] % 2])
    for inputs, start in zip(sets, starts, strict=True):
        assert torch.equal(inputs["x"], start)


def test_a_form_that_fails_leaves_the_others(rows_file):
    def fails(inputs):
        raise RuntimeError("not for this dtype")

    case = adding(less_exact={"broken": fails}, published=fails)
    time_case(case, CPU, FakeClock([]), 0.0)
    found, problems = rows.read(rows_file)
    assert problems == []
    timed = {(row["role"], row["form"]) for row in found if row["kind"] == "timing"}
    assert timed == {("ours", "torch"), ("plain torch", "again")}
    failed = {row["what"]: row["status"] for row in found if row["kind"] == "check"}
    # A plain form that a version of torch lacks is no failure of ours.
    assert failed == {"is timed (less exact)": "not available", "is timed (published)": "failed"}
    assert all(row["bytes"] == 24.0 for row in found if row["kind"] == "timing")


def test_every_role_is_timed():
    case = adding(bare=len, published=len, kernel_only=len, less_exact={"fast": len})
    roles = [role for _, role, _, _ in forms(case, CPU)]
    assert roles == ["ours", "kernel only", "plain torch", "less exact", "bare", "published"]


# compute-sanitizer's output.

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
INVALID = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 4 bytes\n"
    "=========     at gram_kernel+0x120\n========= ERROR SUMMARY: 3 errors\n"
)
UNSUPPORTED = "========= Error: Device not supported. Please refer to the documentation\n"


@pytest.mark.parametrize(
    ("code", "output", "done", "status", "said"),
    [
        (0, CLEAN, 9, "passed", "9 checks; 0 errors"),
        (99, INVALID, 9, "failed", "gram_kernel"),
        (0, INVALID, 9, "failed", "3 errors"),
        (1, UNSUPPORTED, 0, "not available", "does not support"),
        (None, "", 4, "skipped", "4 checks, nothing found so far"),
        (None, INVALID, 4, "failed", "Invalid __global__ write"),
        (2, "Traceback\nImportError: x", 0, "failed", "it ended with status 2"),
        (0, CLEAN, 0, "not available", "no kernels"),
    ],
)
def test_what_the_sanitizer_says(code, output, done, status, said):
    found, detail = sanitizer.judge("memcheck", code, output, done)
    assert found == status and said in detail
