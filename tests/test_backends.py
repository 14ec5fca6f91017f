"""Which backend an op takes: the choice, its scope, and how to ask for it."""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pyeditfast
from pyeditfast import Choice, backend, backends, chosen_backends, ops
from pyeditfast.backends import Candidate, always, choose, explain, limiting

CPU = torch.device("cpu")

OPS = [
    "activation_gap",
    "apply_shift",
    "cholesky_solve",
    "covariance",
    "edit_values",
    "gram",
    "linear_cross_entropy",
    "magnitude_threshold",
    "masked_sgd",
    "random_mask",
    "routed_linear",
    "running_moments",
    "solve_shift",
    "ties_merge",
]

COMPILED = (
    "activation_gap",
    "apply_shift",
    "edit_values",
    "linear_cross_entropy",
    "magnitude_threshold",
    "masked_sgd",
    "random_mask",
    "ties_merge",
)
"""The ops that the compiled extension has too."""


def never(device: torch.device) -> str | None:
    return f"there is no {device.type} here"


def taken() -> str:
    """Return what an op with the candidates torch and reference would take now."""
    return explain("op", [Candidate("torch", always), Candidate("reference", always)], CPU).backend


def test_auto_takes_the_first_candidate():
    choice = explain("op", [Candidate("torch", always), Candidate("reference", always)], CPU)
    assert choice == Choice("op", "torch", "first choice on cpu")


def test_auto_says_what_it_passed_over_and_why():
    candidates = [
        Candidate("cpp", never),
        Candidate("torch", never),
        Candidate("reference", always),
    ]
    assert explain("op", candidates, CPU) == Choice(
        "op",
        "reference",
        "cpp not used: there is no cpu here; torch not used: there is no cpu here",
    )


def test_the_device_is_asked_about():
    candidates = [
        Candidate("cpp", lambda device: None if device.type == "cpu" else f"not on {device.type}"),
        Candidate("torch", always),
    ]
    assert explain("op", candidates, CPU).backend == "cpp"
    elsewhere = explain("op", candidates, torch.device("cuda:1"))
    assert elsewhere == Choice("op", "torch", "cpp not used: not on cuda")


def test_a_named_backend_is_taken_because_it_was_asked_for():
    candidates = [Candidate("torch", always), Candidate("reference", always)]
    with backend("reference"):
        assert explain("op", candidates, CPU) == Choice("op", "reference", "asked for")


def test_a_named_backend_that_the_op_lacks():
    candidates = [Candidate("torch", always), Candidate("reference", always)]
    message = "op has no usable backend 'cpp' on cpu (it has torch, reference)"
    with backend("cpp"), pytest.raises(ValueError, match=re.escape(message)):
        explain("op", candidates, CPU)


def test_a_named_backend_that_does_not_run_here():
    candidates = [Candidate("cpp", never), Candidate("torch", always)]
    message = "op has no usable backend 'cpp' on cpu (cpp not used: there is no cpu here)"
    with backend("cpp"), pytest.raises(ValueError, match=re.escape(message)):
        explain("op", candidates, CPU)


def test_nothing_runs_here():
    message = "op has no usable backend 'auto' on cpu (torch not used: there is no cpu here)"
    with pytest.raises(ValueError, match=re.escape(message)):
        explain("op", [Candidate("torch", never)], CPU)


@pytest.mark.parametrize("name", ["", "Torch", "triton!", "none"])
def test_unknown_names(name):
    message = f"unknown backend {name!r}; choose one of {', '.join(backends.BACKENDS)}"
    with pytest.raises(ValueError, match=re.escape(message)), backend(name):
        pytest.fail("the block must not be entered")
    assert taken() == "torch"


def test_auto_leaves_what_a_limit_names_and_the_name_insists():
    asked = []

    def small(device: torch.device) -> str | None:
        asked.append(device)
        return "too small"

    candidates = [Candidate("cuda", always), Candidate("torch", always)]
    limited = limiting(candidates, "cuda", small)
    assert explain("op", limited, CPU) == Choice("op", "torch", "cuda not used: too small")
    assert asked == [CPU]
    assert explain("op", limiting(candidates, "cuda", always), CPU).backend == "cuda"
    with backend("cuda"):
        assert explain("op", limited, CPU) == Choice("op", "cuda", "asked for")


def test_a_limit_is_asked_last():
    def fail(device: torch.device) -> str | None:
        raise AssertionError("asked")

    first = Candidate("cuda", always, lambda device: "no GPU has run it")
    choice = explain("op", limiting([first, Candidate("torch", always)], "cuda", fail), CPU)
    assert choice == Choice("op", "torch", "cuda not used: no GPU has run it")


# Scope.


def test_blocks_nest():
    assert taken() == "torch"
    with backend("reference"):
        assert taken() == "reference"
        with backend("torch"):
            assert taken() == "torch"
            with backend("auto"):
                assert taken() == "torch"
            assert taken() == "torch"
        assert taken() == "reference"
    assert taken() == "torch"


def test_an_exception_ends_the_choice():
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError("anything")
    assert taken() == "torch"


def test_an_unknown_name_inside_leaves_the_outer_choice():
    with backend("reference"):
        with pytest.raises(ValueError, match="unknown backend"), backend("fast"):
            pass
        assert taken() == "reference"


def test_as_a_decorator():
    @backend("reference")
    def inside() -> str:
        return taken()

    assert [inside(), inside(), taken()] == ["reference", "reference", "torch"]


def test_other_threads_are_not_affected():
    with backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(taken).result() == "torch"
        assert taken() == "reference"


def test_threads_choose_for_themselves():
    barrier = threading.Barrier(2, timeout=30)

    def run(name: str) -> list[str]:
        seen = []
        with backend(name):
            for _ in range(50):
                barrier.wait()
                seen.append(taken())
        barrier.wait()
        seen.append(taken())
        return seen

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run, name) for name in ("reference", "torch")]
        first, second = (future.result(timeout=60) for future in both)
    assert first == ["reference"] * 50 + ["torch"]
    assert second == ["torch"] * 51


def test_tasks_choose_for_themselves():
    async def run(name: str, entered: asyncio.Event, other: asyncio.Event) -> list[str]:
        seen = [taken()]
        with backend(name):
            entered.set()
            await other.wait()
            seen.append(taken())
        return [*seen, taken()]

    async def both() -> list[list[str]]:
        one, two = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(run("reference", one, two), run("torch", two, one))

    first, second = asyncio.run(both())
    assert first == ["torch", "reference", "torch"]
    assert second == ["torch", "torch", "torch"]


# Asking.


def test_every_op_tells_its_backend():
    choices = chosen_backends()
    assert [choice.op for choice in choices] == OPS
    assert all(choice.reason for choice in choices)
    named = {choice.op: choice.backend for choice in choices}
    compiled = {named.pop(op) for op in COMPILED}
    assert len(compiled) == 1 and compiled <= {"cpp", "torch"}
    assert set(named.values()) == {"torch"}


def test_every_op_with_candidates_has_the_name_of_its_file():
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"pyeditfast.ops.{info.name}")
        candidates = getattr(module, "CANDIDATES", ())
        assert bool(candidates) == (info.name in OPS), info.name
        for candidate in candidates:
            assert candidate.backend in backends.BACKENDS[1:]


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_every_op_has_torch_and_reference(name):
    with backend(name):
        choices = chosen_backends()
    assert [choice.op for choice in choices] == OPS
    assert {(choice.backend, choice.reason) for choice in choices} == {(name, "asked for")}


@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda")])
def test_another_device_may_be_asked_about(device):
    choices = {choice.op: choice for choice in chosen_backends(device)}
    assert choices["random_mask"].backend == "torch"
    assert "cpp not used: " in choices["random_mask"].reason
    assert list(choices) == OPS


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_the_ops_follow_the_choice(name, monkeypatch):
    """Every op asks under its own name, and takes what it is told."""
    asked: list[tuple[str, str]] = []

    def spy(op: str, candidates, device: torch.device) -> str:
        answer = choose(op, candidates, device)
        asked.append((op, answer))
        return answer

    for op in OPS:
        monkeypatch.setattr(importlib.import_module(f"pyeditfast.ops.{op}"), "choose", spy)
    keys, values = torch.eye(3), torch.ones(3, 2)
    moments = ops.RunningMoments(5)
    calls = {
        "gram": lambda: ops.gram(keys),
        "covariance": lambda: ops.covariance(keys),
        "cholesky_solve": lambda: ops.cholesky_solve(keys, values),
        "solve_shift": lambda: ops.solve_shift(keys, values),
        "apply_shift": lambda: ops.apply_shift_(
            torch.ones(2, 3), ops.Shift("primal", 2, matrix=torch.ones(2, 3))
        ),
        "running_moments": lambda: moments.update(keys, values),
        "edit_values": lambda: ops.edit_values(keys, values, moments, 1e-6),
        "random_mask": lambda: ops.random_mask(0, 0.5, (3,)),
        "activation_gap": lambda: ops.activation_gap(keys[None], keys, [keys]),
        "routed_linear": lambda: ops.routed_linear(keys[None], keys, [keys], torch.zeros(1)),
        "masked_sgd": lambda: ops.masked_sgd_(keys.clone(), keys, keys, seed=0, ratio=0.5, lr=1.0),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(
            keys, keys, torch.tensor([0, 1, 2])
        ),
        "magnitude_threshold": lambda: ops.magnitude_threshold(keys, 0.5),
        "ties_merge": lambda: ops.ties_merge(keys, [keys], 0.5),
    }
    assert sorted(calls) == OPS
    with backend(name):
        for op, call in calls.items():
            asked.clear()
            call()
            assert (op, name) in asked
            assert {answer for _, answer in asked} == {name}


@pytest.mark.parametrize("call", ["gram", "covariance"])
def test_an_op_without_the_named_backend_raises_when_called(call):
    candidates = importlib.import_module(f"pyeditfast.ops.{call}").CANDIDATES
    names = ", ".join(candidate.backend for candidate in candidates)
    message = f"{call} has no usable backend 'cpp' on cpu (it has {names})"
    with backend("cpp"), pytest.raises(ValueError, match=re.escape(message)):
        getattr(ops, call)(torch.eye(2))


def test_a_choice_is_logged_once(caplog):
    candidates = [Candidate("torch", always), Candidate("reference", always)]
    name = "an_op_of_this_test_alone"
    with caplog.at_level(logging.INFO, logger="pyeditfast.backends"):
        assert choose(name, candidates, CPU) == "torch"
        assert choose(name, candidates, CPU) == "torch"
        with backend("reference"):
            assert choose(name, candidates, CPU) == "reference"
    assert caplog.messages == [
        f"{name} on cpu: torch (first choice on cpu)",
        f"{name} on cpu: reference (asked for)",
    ]


def test_asking_logs_nothing(caplog):
    with caplog.at_level(logging.DEBUG, logger="pyeditfast.backends"):
        chosen_backends()
    assert caplog.records == []


def test_choices_cannot_be_changed():
    choice = chosen_backends()[0]
    with pytest.raises(AttributeError):
        choice.backend = "other"


def test_names_are_public():
    assert pyeditfast.backend is backends.backend
    assert pyeditfast.chosen_backends is backends.chosen_backends
    assert pyeditfast.Choice is backends.Choice


def test_a_reason_that_tells_shapes_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="pyeditfast.backends"):
        for tokens in range(3):
            candidates = [
                Candidate("cuda", lambda device, tokens=tokens: f"not for {tokens} tokens"),
                Candidate("torch", always),
            ]
            assert choose("another_op_of_this_test", candidates, CPU) == "torch"
    assert caplog.messages == [
        "another_op_of_this_test on cpu: torch (cuda not used: not for 0 tokens)"
    ]
