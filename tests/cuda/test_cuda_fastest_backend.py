"""The step of ``make tune`` that measures backends, on the CPU with emulated CUDA."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from bench.gpu import fastest_backend, rows
from bench.gpu.candidates import CandidateError
from bench.gpu.clock import HostClock
from pyeditfast.ops import compiled

CPU = torch.device("cpu")


@pytest.fixture
def rows_file(tmp_path, monkeypatch):
    path = tmp_path / "rows"
    monkeypatch.setenv(rows.VARIABLE, str(path))
    return path


@pytest.fixture
def run(rows_file, emulated_module, monkeypatch):
    """Return a function that runs the step and returns its rows."""
    monkeypatch.setattr(compiled, "load_extension", lambda: emulated_module)

    def step(*options: str) -> list[dict[str, object]]:
        common = ["--device", "cpu", "--size", "tiny", "--op", "cholesky_solve"]
        monkeypatch.setattr(sys, "argv", ["fastest_backend", *common, *options])
        fastest_backend.main()
        found, problems = rows.read(rows_file)
        assert problems == []
        return found

    return step


def test_every_class_is_measured(run):
    found = run()
    names = [case.name for case in fastest_backend.size_classes("cholesky_solve", "tiny")]
    assert len(set(names)) == 8
    assert [row["kind"] for row in found] == ["begin", "fastest"] * 8
    measured = [row for row in found if row["kind"] == "fastest"]
    assert [row["size_class"] for row in measured] == names
    for row in measured:
        assert list(row["median_seconds"]) == ["torch", "cuda"]
        assert row["op"] == "cholesky_solve" and row["backend"] in ("torch", "cuda")


def test_it_goes_on_behind_a_class(run):
    cases = fastest_backend.size_classes("cholesky_solve", "tiny")
    found = run("--after", cases[-2].key)
    assert [row["kind"] for row in found] == ["begin", "fastest"]
    assert found[1]["size_class"] == cases[-1].name


def test_the_faster_one_is_reported_with_both_times(rows_file, monkeypatch):
    case = fastest_backend.size_classes("cholesky_solve", "tiny")[0]
    seconds = {"torch": [3.0, 2.0], "reference": [1.9]}
    in_force: list[str] = []

    def timed(case, form, sets, clock, budget):
        return dataclasses.make_dataclass("Timed", ["median"])(seconds[in_force[-1]].pop(0))

    using = fastest_backend.using
    monkeypatch.setattr(fastest_backend, "using", lambda name: in_force.append(name) or using(name))
    monkeypatch.setattr(fastest_backend, "time_form", timed)
    fastest_backend.tune(case, ["torch", "reference"], CPU, HostClock(), 0.0)
    (row,) = rows.read(rows_file)[0]
    assert row["backend"] == "reference"
    assert row["median_seconds"] == {"torch": 2.0, "reference": 1.9}


def test_a_backend_that_is_far_off_is_no_choice(run, monkeypatch):
    # The package's attribute of that name is the op.
    op = sys.modules["pyeditfast.ops.cholesky_solve"]
    solve = op.solve_on_cuda

    def wrong(gram, rhs):
        solution, pivots = solve(gram, rhs)
        return solution * (1.0 + 1e-3), pivots

    monkeypatch.setattr(op, "solve_on_cuda", wrong)
    found = run()
    assert [row["kind"] for row in found] == ["begin", "check"] * 8
    details = {row["detail"] for row in found if row["kind"] == "check"}
    assert all("cuda: solution differs from torch's by 0.001, allowed" in text for text in details)


def test_a_class_that_does_not_fit_is_left_out(run, monkeypatch):
    monkeypatch.setattr(fastest_backend, "room_for", lambda case, device: "it needs 90 GB")
    found = run()
    assert [row["kind"] for row in found] == ["begin", "check"] * 8
    assert {row["status"] for row in found if row["kind"] == "check"} == {"skipped"}


def test_where_only_torch_runs_that_is_said(run, monkeypatch):
    monkeypatch.setattr(compiled, "load_extension", lambda: None)
    (row,) = run()
    assert (row["kind"], row["status"]) == ("note", "not available")
    assert row["detail"].startswith("only torch runs here (cuda: the CUDA form runs on CUDA")


def test_a_difference_is_an_error_that_names_the_backend():
    case = fastest_backend.size_classes("cholesky_solve", "tiny")[0]
    inputs = case.inputs(CPU, torch.Generator().manual_seed(0))
    fastest_backend.check(case, ["torch", "reference"], inputs)
    results = iter([{"solution": torch.ones(1, 2)}, {"solution": torch.ones(1, 2) * 1.01}])
    shifting = dataclasses.replace(case, run=lambda inputs: next(results))
    with pytest.raises(CandidateError, match=r"reference: solution differs from torch's by 0\.01"):
        fastest_backend.check(shifting, ["torch", "reference"], inputs)
