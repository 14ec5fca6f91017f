"""Both commands from end to end on the CPU, and the plugin that reports tests.

The commands write to one folder, so their tests are in one file, which one process runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu.process import Step, run_step

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_whole_command(tmp_path, interpreter):
    options = ["--device", "cpu", "--size", "tiny", "--ops", "edit_values,random_mask"]
    steps = "device,correctness,ceilings,timing"
    ran = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *options, "--steps", steps, "--results", tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("dry-run-tiny-20")
    content = json.loads(path.read_text())
    assert content["dry_run"] and content["gpu"] == "CPU" and content["goals"] == []
    assert {entry["status"] for entry in content["steps"]} == {"passed"}
    timed = {(entry["op"], entry["form"]) for entry in content["timings"]}
    assert {("edit_values", "triton"), ("random_mask", "torch")} <= timed
    assert {entry["name"] for entry in content["ceilings"]} == {"copy", "bf16", "fp32", "fp64"}
    assert all(entry["of_floor"] > 0 for entry in content["timings"])
    assert "nothing failed" in ran.stdout


@pytest.mark.slow
def test_tuning(tmp_path, interpreter):
    options = ["--device", "cpu", "--size", "tiny", "--ops", "edit_values", "--folder", tmp_path]
    pytest.importorskip("triton")
    from pyeditfast_kernels.edit_values import CANDIDATES

    ran = subprocess.run(
        [sys.executable, "-m", "bench.gpu.tune", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    content = json.loads((tmp_path / "cpu.json").read_text())
    classes = content["configurations"]["edit_values"]
    assert set(classes) == set(CANDIDATES)
    for shape_class, entry in classes.items():
        names = [config.name for config in CANDIDATES[shape_class]]
        assert list(entry["median_seconds"]) == names and entry["config"] in names


@pytest.mark.slow
def test_backends_that_do_not_run_here_are_no_failure(tmp_path):
    options = ["--device", "cpu", "--size", "tiny", "--ops", "cholesky_solve"]
    ran = subprocess.run(
        [sys.executable, "-m", "bench.gpu.tune", *options, "--folder", tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert "backends of cholesky_solve: not available" in ran.stdout
    assert "only torch runs here (cuda: the CUDA form runs on CUDA devices" in ran.stdout
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert content["backends"] == content["configurations"] == {}


@pytest.mark.slow
def test_the_editors(tmp_path, environment):
    options = ("--device", "cpu", "--size", "tiny")
    step = Step("editors", ("-m", "bench.gpu.editors", *options), 200.0)
    outcome = run_step(step, sys.executable, environment, tmp_path, time.monotonic() + 200)
    assert outcome.status == "passed", (outcome.detail, outcome.rows)
    timed = {(row["editor"], row["form"]) for row in outcome.rows if row["kind"] == "editor"}
    forms = ("auto", "auto with kernels", "published")
    assert timed == {(editor, form) for editor in ("UltraEdit", "WISE") for form in forms}


def test_a_suite_that_crashes_tells_what_it_did(tmp_path, environment):
    suite = tmp_path / "test_suite.py"
    suite.write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 + 1 == 3\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_skipped(): pass\n"
        "def test_crash(): os.abort()\n"
        "def test_never(): pass\n"
    )
    missing = tmp_path / "test_missing.py"
    missing.write_text("import a_package_that_is_not_there\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    arguments = ("-m", "pytest", "-q", "-p", "bench.gpu.pytest_rows", "-p", "no:cacheprovider")
    files = ("--continue-on-collection-errors", str(missing), str(suite))
    outcome = run_step(
        Step("tests", (*arguments, *files), 60.0),
        sys.executable,
        environment,
        tmp_path / "steps",
        time.monotonic() + 60,
    )
    assert outcome.status == "failed" and "SIGABRT" not in outcome.rows[-1].get("detail", "")
    found = {
        row["case"].split("::")[-1]: (row["status"], row["detail"])
        for row in outcome.rows
        if row["kind"] == "test"
    }
    assert found["test_good"] == ("passed", "")
    assert found["test_bad"] == ("failed", "assert (1 + 1) == 3")
    assert found["test_skipped"][0] == "skipped"
    assert "test_crash" not in found and "test_never" not in found
    (name,) = [case for case in found if case.endswith("test_missing.py")]
    assert found[name] == ("not available", "needs a_package_that_is_not_there")
    assert outcome.rows[-1]["kind"] == "begin" and "test_crash" in outcome.rows[-1]["case"]
