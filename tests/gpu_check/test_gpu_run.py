"""A run as a whole: whatever its steps do, there is a table and a result file."""

from __future__ import annotations

import json
import sys

import pytest

from bench.gpu import orchestrator, plan, results, table
from bench.gpu.goals import Measurements
from bench.gpu.plan import Phase
from bench.gpu.process import Outcome, Step

EMIT = "import os, time\nfrom bench.gpu.rows import emit\n"


def step(name: str, program: str, limit: float = 30.0) -> Step:
    return Step(name, ("-c", EMIT + program), limit)


@pytest.fixture
def carry_out(monkeypatch, tmp_path):
    """Carry out phases of this test's own, and return status, content of the file, and lines."""

    def carry_out(phases, device="cpu", size="tiny", **chosen):
        monkeypatch.setattr(plan, "plan", lambda *arguments, **options: phases)
        lines = []
        status = orchestrator.carry_out(
            sys.executable,
            size=size,
            device=device,
            build=tmp_path / "build",
            results_folder=tmp_path / "results",
            show=lines.append,
            **chosen,
        )
        (path,) = (tmp_path / "results").iterdir()
        return status, json.loads(path.read_text()), lines, path.name

    return carry_out


def test_every_way_to_fail_is_in_the_table(carry_out, device_row, timing):
    steps = (
        step("good", f"emit(**{timing()})\nemit(**{timing(role='plain torch', form='p')})"),
        step("crashes", "os.abort()"),
        step("hangs", "emit('begin', case='op: case')\ntime.sleep(100)", limit=2.0),
        step("garbage", "open(os.environ['PYEDITFAST_GPU_ROWS'], 'w').write('{{{')"),
        step("mute", "pass"),
        Step("unreadable", ("-m", "no.such.module"), 30.0),
    )
    status, content, lines, name = carry_out(
        [
            Phase("look", 60.0, (step("device", f"emit(**{device_row})"),)),
            Phase("time", 120.0, steps),
        ],
        device="cuda",
        size="full",
    )
    assert status == 1
    assert {entry["step"]: entry["status"] for entry in content["steps"]} == {
        "device": "passed",
        "good": "passed",
        "crashes": "failed",
        "hangs": "cut off",
        "garbage": "failed",
        "mute": "failed",
        "unreadable": "failed",
    }
    assert name.startswith("nvidia-test-1-20") and content["gpu"] == "NVIDIA Test 1"
    assert content["size"] == "full" and not content["dry_run"]
    (entry,) = [entry for entry in content["timings"] if entry["role"] == "ours"]
    assert entry["times_faster_than_plain_torch"] == 1.0
    assert content["goals"] and all(goal["outcome"] == "not measured" for goal in content["goals"])
    text = "\n".join(lines)
    assert "5 failures:" in text and "NVIDIA Test 1; torch 2" in text
    for said in (
        "SIGABRT",
        "stopped after 2 s in op: case",
        "1 unreadable rows",
        "No module named",
    ):
        assert said in text
    assert lines[-1].startswith("wrote ")
    assert any(line.startswith("gram") and "a case" in line and "1 s" in line for line in lines)


@pytest.mark.parametrize(
    ("chosen", "start"),
    [
        ({"device": "cuda", "size": "small"}, "nvidia-test-1-small-20"),
        ({"device": "cuda", "size": "full", "ops": ["gram"]}, "nvidia-test-1-part-20"),
        ({"device": "cuda", "size": "full", "steps": ["device"]}, "nvidia-test-1-part-20"),
        ({"device": "cpu", "size": "full"}, "dry-run-20"),
    ],
)
def test_the_name_of_the_file_says_what_is_in_it(carry_out, device_row, chosen, start):
    look = Phase("look", 60.0, (step("device", f"emit(**{device_row})"),))
    assert carry_out([look], **chosen)[3].startswith(start)


def test_without_a_device_nothing_else_is_run(carry_out):
    phases = [
        Phase("look", 60.0, (step("device", "raise SystemExit('no device')"),)),
        Phase("time", 60.0, (step("other", "emit('note', status='passed', detail='')"),)),
    ]
    status, content, lines, _ = carry_out(phases)
    assert status == 1 and [entry["step"] for entry in content["steps"]] == ["device"]
    assert content["gpu"] == "unknown"
    assert "without a device that works, nothing else is run" in lines


def test_what_cannot_be_built_is_no_failure(carry_out, device_row):
    steps = (step("build", "emit('note', status='not available', detail='no compiler')"),)
    status, content, lines, _ = carry_out(
        [
            Phase("look", 60.0, (step("device", f"emit(**{device_row})"),)),
            Phase("build", 60.0, steps),
        ]
    )
    assert status == 0 and content["failures"] == []
    assert "not available: build: no compiler" in lines and "nothing failed" in lines


def test_steps_run_beside_each_other_and_a_late_one_is_cut_off(carry_out, device_row):
    wait = "time.sleep(1)\nemit('note', status='passed', detail='')"
    late = step("late", "time.sleep(100)")
    _, content, _, _ = carry_out(
        [
            Phase("look", 60.0, (step("device", f"emit(**{device_row})"),)),
            Phase("check", 5.0, (step("a", wait), step("b", wait), late), 3),
        ]
    )
    assert {entry["step"]: entry["status"] for entry in content["steps"]} == {
        "device": "passed",
        "a": "passed",
        "b": "passed",
        "late": "cut off",
    }
    assert content["seconds"] < 60


def test_a_python_that_does_not_exist(tmp_path):
    lines = []
    (outcome,) = orchestrator.run_phases(
        [Phase("check", 60.0, (step("a", "pass"),))],
        str(tmp_path / "no-python"),
        {},
        tmp_path,
        lines.append,
    )
    assert outcome.status == "failed" and "FileNotFoundError" in outcome.detail


def test_the_schema_of_the_file(timing, check, device_row):
    ceiling = {"kind": "ceiling", "name": "copy", "value": 4e12, "unit": "bytes/s"}
    matmul = {"kind": "ceiling", "name": "bf16", "value": 8e14, "unit": "FLOP/s"}
    test = {"kind": "test", "case": "t", "status": "failed", "detail": "d"}
    rows = [device_row, ceiling, matmul, check(), test, timing(bytes=2e12), timing(form="cuda")]
    outcomes = [Outcome("a", "passed", 1.234, "", rows)]
    about = {"date": "2030-01-02", "commit": "c", "size": "full"}
    measurements = Measurements(rows)
    content = results.assemble(outcomes, [], measurements, about)
    json.dumps(content, allow_nan=False)
    assert set(content) == {
        "schema",
        "date",
        "commit",
        "size",
        "gpu",
        "device",
        "versions",
        "steps",
        "ceilings",
        "checks",
        "tests",
        "timings",
        "editors",
        "goals",
        "failures",
    }
    first, second = content["timings"]
    assert first["of_floor"] == 0.5 and first["bound"] == "copy"
    assert "of_floor" not in second
    assert content["tests"] == {
        "counts": {"failed": 1},
        "others": [{"case": "t", "status": "failed", "detail": "d"}],
    }
    assert content["failures"] == ["a: t: d"]
    assert all("kind" not in entry for entry in content["checks"])


def test_the_table_is_short_and_leaves_plain_backends_out(timing, check):
    rows = [timing(), timing(form="torch", median_seconds=4.0), timing(role="less exact")]
    rows += [check(status="failed", case=f"case {number}") for number in range(100)]
    outcomes = [Outcome("a", "failed", 1.0, "", rows)]
    about = {"commit": "c", "size": "full"}
    lines = list(table.lines(outcomes, [], Measurements(rows), about))
    assert len([line for line in lines if line.startswith("gram") and "1 s" in line]) == 1
    assert not any("4 s" in line for line in lines)
    assert "100 failures:" in lines and len(lines) < 50
    assert "  … and 75 more, in the result file" in lines


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 µs"), (4e-8, "0.04 µs")]
)
def test_times_are_shown_with_a_unit(value, text):
    assert table.seconds(value) == text


# The plan.


@pytest.mark.parametrize(("size", "most"), [("full", 480), ("small", 90)])
def test_a_run_ends_in_time(size, most):
    phases = plan.plan(size, "cuda", workers=8)
    deadlines = [phase.deadline for phase in phases]
    assert deadlines == sorted(deadlines) and deadlines[-1] <= most
    assert phases[-1].name == "time" and phases[-1].beside == 1
    names = [step.name for phase in phases for step in phase.steps]
    assert len(set(names)) == len(names)


def test_every_op_is_checked_and_timed():
    from bench.gpu.places import REPOSITORY

    files = {path.stem for path in (REPOSITORY / "bench" / "gpu" / "cases").glob("*.py")}
    assert files - {"__init__", "memories"} == set(plan.OPS)
    for size in plan.SIZES:
        phases = plan.plan(size, "cuda")
        for module in ("correctness", "timing"):
            named = [
                op
                for phase in phases
                for step in phase.steps
                if f"bench.gpu.{module}" in step.arguments
                for op in step.arguments[step.arguments.index("--ops") + 1].split(",")
            ]
            assert sorted(named) == sorted(plan.OPS)


def test_every_test_file_is_run_once():
    from bench.gpu.places import REPOSITORY

    files = sorted(
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tests").rglob("test_*.py")
    )
    named = [
        argument
        for step in plan.tests(1.0)
        for argument in step.arguments
        if argument.startswith("tests") and "::" not in argument
    ]
    assert sorted(named) == files


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ops": ["grams"]}, "unknown op 'grams'; choose from gram, "),
        ({"steps": ["time"]}, "unknown step 'time'; choose from device, "),
    ],
)
def test_unknown_names_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan.plan("full", "cuda", **wrong)
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        plan.plan("huge", "cuda")


def test_steps_can_be_chosen():
    phases = plan.plan("full", "cuda", ops=["gram"], steps=["device", "timing"])
    assert [step.name for phase in phases for step in phase.steps] == ["device", "timing gram"]
