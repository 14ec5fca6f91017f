"""Steps that crash, hang, or print garbage."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from bench.gpu.process import DEVICE_IS_LOST, Outcome, Step, run_step

START = "import os, sys, time, signal, subprocess\nfrom bench.gpu.rows import emit\n"

NOTE = "emit('note', status='passed', detail='all well')\n"


@pytest.fixture
def run(tmp_path, environment):
    def run(
        program: str, limit: float = 30.0, resumes: bool = False, left: float = 60.0
    ) -> Outcome:
        step = Step("a step", ("-c", START + program), limit, resumes)
        deadline = time.monotonic() + left
        return run_step(step, sys.executable, environment, tmp_path / "steps", deadline)

    return run


def checked(case: str, status: str = "passed") -> str:
    about = {"op": "op", "backend": "b", "case": case, "what": "w", "status": status, "detail": "d"}
    return f"emit('begin', case='op: {case}')\nemit('check', **{about})\n"


def test_a_step_that_passes(run):
    outcome = run(f"print('noise {{')\n{checked('one')}{NOTE}")
    assert (outcome.status, outcome.detail) == ("passed", "all well")
    assert [row["kind"] for row in outcome.rows] == ["begin", "check", "note"]


def test_a_failed_check_is_a_failed_step(run):
    outcome = run(checked("one") + checked("two", "failed") + NOTE)
    assert (outcome.status, outcome.detail) == ("failed", "1 failed")


def test_a_step_that_has_nothing_to_work_with(run):
    outcome = run("emit('note', status='not available', detail='no compiler')")
    assert (outcome.status, outcome.detail) == ("not available", "no compiler")


def test_a_step_that_ends_badly_shows_the_end_of_its_log(run):
    outcome = run("print('first')\nsys.exit('the reason')")
    assert outcome.status == "failed"
    assert outcome.detail == "it ended with status 1: first | the reason"


def test_a_crash(run):
    outcome = run(checked("one") + "os.kill(os.getpid(), signal.SIGSEGV)")
    assert outcome.status == "failed" and outcome.detail.startswith("it was ended by SIGSEGV")
    assert len(outcome.rows) == 2


AFTER = "after = sys.argv[sys.argv.index('--after') + 1] if '--after' in sys.argv else None\n"


def test_a_step_goes_on_behind_the_case_that_crashed(run):
    outcome = run(
        f"{AFTER}if after is None:\n"
        "    emit('begin', case='op: one')\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
        f"assert after == 'op: one'\n{checked('two')}{NOTE}",
        resumes=True,
    )
    assert outcome.status == "failed" and outcome.detail == "1 failed"
    found = [(row["case"], row["status"]) for row in outcome.rows if row["kind"] == "check"]
    assert found == [("two", "passed"), ("one", "failed")]
    assert "it was ended by SIGSEGV" in outcome.rows[-1]["detail"]


def test_a_lost_device_was_reported_already(run):
    outcome = run(
        f"{AFTER}if after is None:\n"
        f"    exec({checked('one', 'failed')!r})\n"
        f"    sys.exit({DEVICE_IS_LOST})\n{checked('two')}{NOTE}",
        resumes=True,
    )
    found = [(row["case"], row["status"]) for row in outcome.rows if row["kind"] == "check"]
    assert found == [("one", "failed"), ("two", "passed")]


def test_a_step_that_always_crashes_is_given_up(run, tmp_path):
    counter = tmp_path / "count"
    outcome = run(
        f"open({str(counter)!r}, 'a').write('x')\n"
        f"number = len(open({str(counter)!r}).read())\n"
        "emit('begin', case=f'op: {number}')\nos._exit(3)",
        resumes=True,
    )
    assert outcome.status == "failed"
    assert counter.read_text() == "xxxx"


def test_a_crash_before_any_case_is_not_tried_again(run, tmp_path):
    counter = tmp_path / "count"
    outcome = run(f"open({str(counter)!r}, 'a').write('x')\nsys.exit('no torch')", resumes=True)
    assert outcome.status == "failed" and "no torch" in outcome.detail
    assert counter.read_text() == "x"


def test_a_step_that_hangs_is_stopped_with_its_children(run, tmp_path):
    pid = tmp_path / "pid"
    outcome = run(
        "child = subprocess.Popen(['sleep', '300'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        f"{checked('one')}emit('begin', case='op: two')\ntime.sleep(300)",
        limit=2.0,
    )
    assert (outcome.status, outcome.detail) == ("cut off", "stopped after 2 s in op: two")
    assert len([row for row in outcome.rows if row["kind"] == "check"]) == 1
    assert outcome.seconds < 20
    assert not is_running(int(pid.read_text()))


def test_a_case_that_hangs_is_passed_over(run, tmp_path):
    step = Step(
        "a step",
        (
            "-c",
            f"{START}{AFTER}if after is None:\n"
            f"    exec({checked('one')!r})\n"
            "    emit('begin', case='op: two')\n"
            "    time.sleep(300)\n"
            f"assert after == 'op: two'\n{checked('three')}{NOTE}",
        ),
        60.0,
        resumes=True,
        quiet=2.0,
    )
    environment = {**os.environ}
    outcome = run_step(step, sys.executable, environment, tmp_path, time.monotonic() + 60)
    found = [(row["case"], row["status"]) for row in outcome.rows if row["kind"] == "check"]
    assert found == [("one", "passed"), ("three", "passed"), ("two", "failed")]
    assert outcome.rows[-1]["detail"] == "hung for 2 s" and outcome.seconds < 30


def is_running(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("garbage", "a line is not JSON: 'garbage'"),
        ("[1]", "a row is wrong: it is not an object"),
        ('{"kind": "other"}', "a row is wrong: its kind is 'other'"),
        ('{"kind": "note", "status": "fine", "detail": ""}', "status is 'fine'"),
        ('{"kind": "note", "status": "passed"}', "detail is None"),
        ('{"kind": "ceiling", "name": "copy", "value": NaN, "unit": ""}', "a line is not JSON"),
        ('{"kind": "ceiling", "name": "copy", "value": true, "unit": ""}', "value is True"),
    ],
)
def test_garbage_among_the_rows(run, line, problem):
    outcome = run(f"open(os.environ['PYEDITFAST_GPU_ROWS'], 'a').write({line!r} + '\\n')\n{NOTE}")
    assert outcome.status == "failed" and problem in outcome.detail
    assert len(outcome.rows) == 1


def test_a_step_that_reports_nothing(run):
    outcome = run("print('something else')")
    assert (outcome.status, outcome.detail) == ("failed", "it reported nothing: something else")


def test_no_time_left(run):
    outcome = run(NOTE, left=0.5)
    assert (outcome.status, outcome.detail) == ("cut off", "not started: no time was left")


def test_the_deadline_counts_before_the_limit(run):
    outcome = run("time.sleep(300)", limit=200.0, left=2.0)
    assert outcome.status == "cut off" and outcome.seconds < 20


def test_rows_survive_what_json_lacks(rows_file, timing):
    from bench.gpu import rows

    rows.emit("note", status="passed", detail="é", error=float("nan"))
    assert json.loads(rows_file.read_text())["error"] is None
    with pytest.raises(ValueError, match="its kind is 'nothing'"):
        rows.emit("nothing")
    with pytest.raises(ValueError, match="role is 'theirs'"):
        rows.emit(**timing(role="theirs"))


def test_steps_find_every_package_without_an_installation(environment):
    paths = environment["PYTHONPATH"].split(os.pathsep)
    links = {path.name: path.resolve().name for path in Path(paths[0]).iterdir()}
    assert links == {
        "pyeditfast": "pyeditfast",
        "pyeditfast_kernels": "kernels",
        "pyeditfast_published": "published",
    }
    assert Path(paths[1]).name == "tests"
    assert environment["TRITON_INTERPRET"] == "1"
