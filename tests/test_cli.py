"""The command line as a user types it: results, messages, exit codes, and going on after a stop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import CommandLine, save_tiny_llama, write_edits
from facts import facts
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from pyeditfast import UltraEditConfig, UltraEditor
from pyeditfast.cli import edit


@pytest.fixture
def model_dir(tmp_path) -> Path:
    return save_tiny_llama(tmp_path / "model")


@pytest.fixture
def run(monkeypatch, capsys) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_edit_saves_what_the_editor_gives(model_dir, tmp_path, run):
    edits = write_edits(tmp_path / "edits.jsonl", 12)
    out = tmp_path / "out"
    report = tmp_path / "report.json"
    options = ["--turn-size", 5, "--lr", 1e-4, "--score", "--report", report]
    code, printed, errors = run("edit", model_dir, edits, "--out", out, *options)
    assert code == 0, errors
    for line in (
        "12 records",
        "12 edits in 3 turns",
        "before: efficacy",
        "after:  efficacy",
        "saved to",
    ):
        assert line in printed
    assert "12/12" in errors
    assert json.loads(report.read_text())["edits"] == 12
    model = tiny_model("llama")
    config = UltraEditConfig(
        ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"), lr=1e-4, turn_size=5
    )
    UltraEditor(model, tiny_tokenizer(), config).edit(facts(12))
    saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_a_stopped_run_goes_on(model_dir, tmp_path, monkeypatch, run):
    edits = write_edits(tmp_path / "edits.jsonl", 23)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--turn-size", 5, "--lr", 1e-4, "--out"]
    assert run("edit", model_dir, edits, *options, whole)[0] == 0
    original = UltraEditor._run_turn

    def interrupted(self, turn, strict, clock):
        if self.turns == 2:
            raise KeyboardInterrupt
        original(self, turn, strict, clock)

    monkeypatch.setattr(UltraEditor, "_run_turn", interrupted)
    code, printed, _ = run("edit", model_dir, edits, *options, parts)
    monkeypatch.setattr(UltraEditor, "_run_turn", original)
    assert code == 130
    assert "saving the 10 edits made so far" in printed
    # The same command, as the message says, with --resume.
    resumed = ["--resume", "--turn-size", 5, "--lr", 1e-4]
    code, printed, errors = run("edit", model_dir, edits, "--out", parts, *resumed)
    assert code == 0, errors
    assert "10 edits from 10 records; going on from there" in printed
    assert "13 edits in 3 turns" in printed
    first, second = (
        AutoModelForCausalLM.from_pretrained(out).state_dict() for out in (whole, parts)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluate(model_dir, tmp_path, run):
    edits = write_edits(tmp_path / "edits.jsonl", 6)
    scores = tmp_path / "scores.json"
    code, printed, _ = run("evaluate", model_dir, edits, "--exact", "--limit", 4, "--json", scores)
    assert code == 0
    assert "efficacy" in printed
    saved = json.loads(scores.read_text())
    assert saved["counts"]["efficacy"] == 4
    assert set(saved["exact"]) == {"efficacy", "generalization", "specificity"}


def test_info_names_every_op_and_why(run):
    code, printed, _ = run("info")
    assert code == 0
    for word in ("torch", "transformers", "extension", "ops on cpu", "solve_shift", "random_mask"):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "{model}", "{edits}", "--out", "{out}", "--module", "lm_hed"], "nearest are"),
        (["edit", "{model}", "{edits}", "--out", "{out}", "--preset", "gpt-5"], "unknown preset"),
        (["edit", "{model}", "{edits}", "--out", "{out}", "--lr", "-1"], "lr is -1.0"),
        (["edit", "{model}", "{edits}", "--out", "{out}", "--dtype", "int4"], "dtype is 'int4'"),
        (
            ["edit", "{model}", "{edits}", "--out", "{out}", "--resume"],
            "was not saved by an editor",
        ),
        (["edit", "{model}", "{none}", "--out", "{out}"], "none.json"),
        (["edit", "{none}", "{edits}", "--out", "{out}"], "is not a directory with a model"),
        (["edit", "{model}", "{broken}", "--out", "{out}"], "line 2"),
        (["evaluate", "{model}", "{edits}", "--format", "odd"], "odd"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(model_dir, tmp_path, run, arguments, message):
    places = {
        "model": model_dir,
        "edits": write_edits(tmp_path / "edits.jsonl", 3),
        "out": tmp_path / "out",
        "none": tmp_path / "none.json",
        "broken": tmp_path / "broken.jsonl",
    }
    places["broken"].write_text('{"prompt": "a", "target": "b"}\n{"prompt": oops}\n')
    filled = [argument.format(**places) for argument in arguments]
    code, _, errors = run(*filled)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "pyeditfast.json").exists()


def test_an_edited_model_is_not_overwritten(model_dir, tmp_path, run):
    edits = write_edits(tmp_path / "edits.jsonl", 3)
    out = tmp_path / "out"
    command = ("edit", model_dir, edits, "--out", out)
    assert run(*command)[0] == 0
    code, _, errors = run(*command)
    assert code == 2
    assert "use --resume or another --out" in errors
    code, _, errors = run(*command, "--resume", "--lr", "0.5")
    assert code == 2
    assert "lr differ" in errors


def test_bad_records_can_be_passed_over(model_dir, tmp_path, run):
    edits = write_edits(tmp_path / "edits.jsonl", 3)
    edits.write_text('{"prompt": "only a prompt", "target": 7}\n' + edits.read_text())
    command = ("edit", model_dir, edits, "--out", tmp_path / "out", "--format", "pyeditfast")
    code, _, errors = run(*command)
    assert code == 2
    assert "target" in errors
    code, printed, errors = run(*command, "--skip-bad-records")
    assert code == 0, errors
    assert "3 edits in 1 turn," in printed
    assert errors.count("skipped:") == 1


def test_the_command_is_installed():
    script = Path(sys.executable).with_name("pyeditfast")
    printed = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("edit", "evaluate", "demo", "info"):
        assert command in printed


def test_a_failure_keeps_the_turns_before_it(model_dir, tmp_path, run):
    edits = write_edits(tmp_path / "edits.jsonl", 12)
    edits.write_text(edits.read_text() + '{"prompt": "nothing to say", "target": " "}\n')
    out, report = tmp_path / "out", tmp_path / "report.json"
    options = ["--turn-size", 5, "--strict", "--out", out, "--report", report]
    code, printed, errors = run("edit", model_dir, edits, *options)
    assert code == 2
    assert "the target is empty" in errors
    assert "saving the 10 edits made so far" in printed
    assert UltraEditor.load(out).edits == 10
    assert json.loads(report.read_text())["edits"] == 10


def test_places_are_checked_before_any_work(model_dir, tmp_path, monkeypatch, run):
    edits = write_edits(tmp_path / "edits.jsonl", 3)
    monkeypatch.setattr(edit, "new_editor", lambda *arguments: pytest.fail("too late"))
    file = tmp_path / "file"
    file.write_text("")
    out = tmp_path / "out"
    for options, message in (
        (["--out", file], "is a file"),
        (["--out", model_dir], "holds a model"),
        (["--out", out, "--report", tmp_path / "nowhere" / "r.json"], "there is no directory"),
    ):
        code, _, errors = run("edit", model_dir, edits, *options)
        assert code == 2
        assert message in errors
