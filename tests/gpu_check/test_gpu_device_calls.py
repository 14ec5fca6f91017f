"""What is asked of CUDA, with stand-ins for its events, streams and graphs.

They show order and logic; what CUDA does is seen on a GPU alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch

from bench.gpu import asynchronous, clock, rows
from bench.gpu.case import Case
from bench.gpu.clock import CudaClock, measure

CUDA = torch.device("cuda", 0)


@pytest.fixture
def log(monkeypatch):
    """Note what events and passes are asked for; an event's time is the number of calls before."""
    noted: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            noted.append("event")
            self.time = noted.count("call")

        def synchronize(self) -> None:
            noted.append("wait for event")

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.time - self.time) + 1e-3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: noted.append("wait"))
    monkeypatch.setattr(clock, "SCRATCH_BYTES", 64)
    read = CudaClock._pass
    monkeypatch.setattr(CudaClock, "_pass", lambda self: (noted.append("pass"), read(self)))
    return noted


def test_events_are_recorded_around_the_call_behind_passes(log):
    timer = CudaClock(torch.device("cpu"), 16)
    assert log == ["pass", "event", "pass", "event", "wait for event"]
    assert timer.scratch.numel() == 16 and timer.pass_seconds == 1e-5
    log.clear()
    timer.prepare(0.0)
    timer.prepare(2e-5)
    timer.prepare(1.0)
    assert log == ["pass"] * (1 + 5 + clock.MOST_PASSES)
    log.clear()
    read, host = timer.time(lambda: log.append("call"))
    assert log == ["event", "call", "event"] and read() == pytest.approx(1.0) and host > 0


def test_nothing_waits_between_the_rounds(log):
    timer = CudaClock(torch.device("cpu"), 16)
    log.clear()
    befores: list[int] = []

    def before(number: int) -> None:
        befores.append(number)
        log.append("before")

    found = measure(timer, lambda number: log.append("call"), before, budget=1e-9)
    assert found.median == pytest.approx(1.0) and found.rounds == 3
    rounds = log[log.index("wait", log.index("wait") + 1) + 1 :]
    assert rounds.count("wait") == 1 and rounds[-1] == "wait"
    assert rounds[0] == "before" and rounds[1] == "pass" and befores == [0, 1, 2, 0, 1, 2]


@pytest.fixture
def cuda(monkeypatch):
    """Stand in for the calls of ``asynchronous``; capturing remembers, replaying calls again."""
    state = {"mode": 0, "modes": [], "replay": None}

    class Graph:
        def replay(self) -> None:
            if state["replay"] is not None:
                state["replay"]()

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            pass

    def set_mode(mode) -> None:
        state["mode"] = mode
        state["modes"].append(mode)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    return state


def statuses(path) -> dict[str, tuple[str, str]]:
    found, problems = rows.read(path)
    assert problems == []
    return {row["what"]: (row["status"], row["detail"]) for row in found}


def case(run: Callable, writes: tuple[str, ...] = ()) -> Case:
    return Case("gram", "a case", lambda device, generator: {}, run, writes=writes)


def test_a_case_that_waits_for_nothing(cuda, rows_file):
    inputs = {"x": torch.ones(3)}
    passing = case(lambda inputs: {"y": 2 * inputs["x"]})
    asynchronous.check_asynchronous(passing, "triton", inputs, CUDA)
    assert statuses(rows_file) == {"no host sync": ("passed", ""), "CUDA graph": ("passed", "")}
    assert cuda["modes"] == ["error", 0]


def test_a_case_that_waits(cuda, rows_file):
    def run(inputs):
        if cuda["mode"] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return {"y": inputs["x"]}

    asynchronous.check_asynchronous(case(run), "triton", {"x": torch.ones(3)}, CUDA)
    found = statuses(rows_file)
    assert found["no host sync"] == ("failed", "called a synchronizing CUDA operation")
    assert cuda["mode"] == 0


def test_an_error_of_another_kind_is_not_taken_for_waiting(cuda, rows_file):
    def run(inputs):
        if cuda["mode"] == "error":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"y": inputs["x"]}

    with pytest.raises(RuntimeError, match="illegal"):
        asynchronous.check_asynchronous(case(run), "triton", {"x": torch.ones(3)}, CUDA)
    assert cuda["mode"] == 0


@pytest.mark.parametrize("restores", [True, False])
def test_a_replay_begins_with_what_the_call_began_with(cuda, rows_file, restores):
    held = []

    def run(inputs):
        held.append(inputs["x"])
        return {"x": inputs["x"].add_(1.0)}

    # The graph adds once more to what its tensor holds by then.
    cuda["replay"] = lambda: held[-1].add_(1.0 if restores else 2.0)
    inputs = {"x": torch.zeros(3)}
    asynchronous.check_asynchronous(case(run, ("x",)), "triton", inputs, CUDA)
    wanted = ("passed", "") if restores else ("failed", "the replay differs from the call")
    assert statuses(rows_file)["CUDA graph"] == wanted
    assert torch.equal(inputs["x"], torch.zeros(3))


def test_a_case_that_cannot_be_captured(cuda, rows_file, monkeypatch):
    @contextlib.contextmanager
    def graph(_):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    run = case(lambda inputs: {"y": inputs["x"]})
    asynchronous.check_asynchronous(run, "triton", {"x": torch.ones(3)}, CUDA)
    status, detail = statuses(rows_file)["CUDA graph"]
    assert status == "failed" and "it cannot be captured: operation not permitted" in detail


def test_without_cuda_it_is_said(rows_file):
    asynchronous.check_asynchronous(case(len), "triton", {}, torch.device("cpu"))
    assert {status for status, _ in statuses(rows_file).values()} == {"skipped"}
