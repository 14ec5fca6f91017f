"""WISE's steps as a CUDA graph, and where none can be captured; torch.cuda is a stand-in."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pyeditfast.editors.wise_graph import StepGraphs


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def cuda(monkeypatch):
    """Stand in for torch.cuda; a capture ends with the error in ``outcome``, if there is one."""
    outcome: list[Exception] = []
    captures, replays = [], []

    class Graph:
        def replay(self):
            replays.append(self)

    @contextlib.contextmanager
    def graph(into, stream):
        captures.append(into)
        yield
        if outcome:
            raise outcome[0]

    for name, value in (
        ("CUDAGraph", Graph),
        ("graph", graph),
        ("Stream", Stream),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("current_stream", Stream),
        ("synchronize", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return outcome, captures, replays


def run(graphs, steps):
    """Take ``steps`` steps and return how often the step was called."""
    calls = []
    with graphs.replayed(lambda: calls.append(None)) as take:
        for _ in range(steps):
            take()
    return len(calls)


def test_steps_are_captured_after_two_and_replayed(cuda, caplog):
    _, captures, replays = cuda
    graphs = StepGraphs()
    # The third call is the capture, which computes nothing.
    assert run(graphs, 7) == 3
    assert (len(captures), len(replays)) == (1, 5)
    assert run(graphs, 7) == 3
    assert (len(captures), len(replays)) == (2, 10)
    assert not caplog.records


def test_a_model_that_cannot_be_captured_is_tried_and_named_once(cuda, caplog):
    outcome, captures, replays = cuda
    outcome.append(RuntimeError("operation not permitted\nwhen stream is capturing"))
    graphs = StepGraphs()
    assert run(graphs, 7) == 8
    assert [run(graphs, 7) for _ in range(3)] == [7, 7, 7]
    assert (len(captures), len(replays)) == (1, 0)
    assert caplog.messages == [
        "WISE's steps run one by one, not as a CUDA graph: operation not permitted"
    ]
