"""WISE on the command line: editing, going on after a stop, evaluating, and mistakes."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from command_line import CommandLine, save_tiny_llama, write_edits
from facts import facts
from tiny_models import tiny_model, tiny_tokenizer

from pyeditfast import UltraEditor
from pyeditfast.cli import edit as edit_command
from pyeditfast.editors.wise import WiseEditor
from pyeditfast.editors.wise_config import WiseConfig

CONFIG = WiseConfig(
    n_iter=15,
    act_margin=(0.5, 2.0, 1.0),
    save_freq=2,
    merge_freq=4,
    templates=("{}", "So: {}"),
)
OPTIONS = (
    *("--method", "wise", "--n-iter", 15, "--act-margin", 0.5, 2, 1, "--save-freq", 2),
    *("--merge-freq", 4, "--template", "{}", "--template", "So: {}"),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def run(monkeypatch, capsys) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def assert_same_memories(one: WiseEditor, two: WiseEditor) -> None:
    assert (one.edits, one.records) == (two.edits, two.records)
    assert torch.equal(one.layer.thresholds, two.layer.thresholds)
    assert len(one.layer.side_weights) == len(two.layer.side_weights) > 0
    for first, second in zip(one.layer.side_weights, two.layer.side_weights, strict=True):
        assert torch.equal(first, second)


def test_edit_saves_what_the_editor_gives(model_dir, tmp_path, run):
    edits = write_edits(tmp_path / "edits.jsonl", 7)
    out = tmp_path / "out"
    code, printed, errors = run(
        "edit", model_dir, edits, "--out", out, *OPTIONS, "--calibrate", "--score"
    )
    assert code == 0, errors
    assert "7/7" in errors
    for line in (
        "editing model.layers.2.mlp.down_proj",
        "before: efficacy",
        "7 edits in 7 turns",
        "side memory 0: 4 edits, threshold ",
        "side memory 2: 1 edit, threshold ",
        "% of its edit prompts below the threshold",
        "after:  efficacy",
        "routed as wanted: efficacy ",
    ):
        assert line in printed
    assert not (out / "config.json").exists()
    assert not list(out.glob("model*"))
    config = WiseConfig(**{**CONFIG.to_dict(), "calibrate": True})
    editor = WiseEditor(tiny_model("llama"), tiny_tokenizer(), config)
    editor.edit(facts(7))
    assert f"threshold {editor.calibrations[0].threshold:.4g}" in printed
    saved = WiseEditor.load(out)
    assert saved.config.calibrate
    assert_same_memories(saved, editor)


def test_evaluate_tells_routes_and_draws_them(model_dir, tmp_path, run):
    pytest.importorskip("matplotlib")
    edits = write_edits(tmp_path / "edits.jsonl", 4)
    out, plot, scores = tmp_path / "out", tmp_path / "gaps.png", tmp_path / "scores.json"
    assert run("edit", model_dir, edits, "--out", out, *OPTIONS)[0] == 0
    code, printed, errors = run("evaluate", out, edits, "--plot", plot, "--json", scores)
    assert code == 0, errors
    assert "routed as wanted: efficacy " in printed
    assert f"drawn in {plot}" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    routing = json.loads(scores.read_text())["routing"]
    assert routing["counts"]["efficacy"] == len(routing["gaps"]["efficacy"]) == 4
    assert len(routing["thresholds"]) == 1
    assert 0 <= routing["specificity"] <= 1
    # The base model has none of it.
    code, printed, errors = run("evaluate", model_dir, edits, "--json", scores)
    assert code == 0, errors
    assert "routed" not in printed
    assert json.loads(scores.read_text())["routing"] is None
    code, _, errors = run("evaluate", model_dir, edits, "--plot", plot)
    assert code == 2
    assert "has none" in errors


def test_prompts_are_scored_in_the_chat_template_that_they_were_edited_in(model_dir, tmp_path, run):
    edits = write_edits(tmp_path / "edits.jsonl", 2)
    base, out, scores = tmp_path / "chat", tmp_path / "out", tmp_path / "scores.json"
    shutil.copytree(model_dir, base)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
    tokenizer.save_pretrained(base)
    arguments = (base, edits, "--out", out, *OPTIONS, "--chat-template")
    assert run("edit", *arguments)[0] == 0

    def scored(*options: str) -> tuple[dict[str, float], bool]:
        code, printed, errors = run("evaluate", out, edits, "--json", scores, *options)
        assert code == 0, errors
        return json.loads(scores.read_text()), "put into the chat template" in printed

    by_default, told = scored()
    assert told
    assert scored("--chat-template") == (by_default, False)
    without, told = scored("--no-chat-template")
    assert without != by_default and not told


def test_a_stopped_run_goes_on(model_dir, tmp_path, monkeypatch, run):
    edits = write_edits(tmp_path / "edits.jsonl", 7)
    lines = edits.read_text().splitlines()
    # A record without a target counts for the place to go on from, not for the edits.
    edits.write_text("\n".join([*lines[:2], '{"prompt": "a", "target": " "}', *lines[2:]]))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("edit", model_dir, edits, "--out", whole, *OPTIONS)[0] == 0
    original = WiseEditor._run_turn

    def interrupted(self, *arguments):
        if self.edits == 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(WiseEditor, "_run_turn", interrupted)
    code, printed, _ = run("edit", model_dir, edits, "--out", parts, *OPTIONS)
    monkeypatch.setattr(WiseEditor, "_run_turn", original)
    assert code == 130
    assert "saving the 5 edits made so far" in printed
    report = tmp_path / "report.json"
    resumed = ("edit", model_dir, edits, "--out", parts, "--resume", "--report", report)
    code, printed, errors = run(*resumed, *OPTIONS)
    assert code == 0, errors
    assert "5 edits from 6 records; going on from there" in printed
    assert "2 edits in 2 turns" in printed
    assert json.loads(report.read_text())["rejected"] == []
    assert_same_memories(WiseEditor.load(parts), WiseEditor.load(whole))


def test_resume_refuses_what_does_not_belong_together(model_dir, tmp_path, run):
    edits = write_edits(tmp_path / "edits.jsonl", 2)
    out = tmp_path / "out"
    command = ("edit", model_dir, edits, "--out", out)
    assert run(*command, *OPTIONS)[0] == 0
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    for arguments, message in (
        ((*command, *OPTIONS), "holds an edited model; use --resume"),
        ((*command, "--method", "wise", "--resume", "--n-iter", 3, "--replay"), "n_iter, replay"),
        ((*command, "--method", "wise", "--resume", "--preset", "llama-3-8b"), "act_margin, act"),
        ((*command, "--resume"), "method 'ultraedit' is needed"),
        (
            ("edit", other, edits, "--out", out, "--method", "wise", "--resume"),
            "other weights",
        ),
        (("edit", out, edits, "--out", tmp_path / "more"), "holds side memories of WISE"),
    ):
        code, _, errors = run(*arguments)
        assert code == 2
        assert message in errors


def test_edits_that_are_not_routed_are_told_by_their_number(model_dir, tmp_path, run):
    edits = write_edits(tmp_path / "edits.jsonl", 5)
    out, report = tmp_path / "out", tmp_path / "report.json"
    options = (*OPTIONS, "--act-ratio", 50, "--out", out)
    assert run("edit", model_dir, edits, *options, "--limit", 2)[0] == 0
    code, printed, errors = run("edit", model_dir, edits, *options, "--resume", "--report", report)
    assert code == 0, errors
    assert printed.count("not routed edit") == 3
    assert [edit["index"] for edit in json.loads(report.read_text())["not_routed"]] == [2, 3, 4]


def test_every_option_reaches_its_setting(model_dir, tmp_path, monkeypatch, run):
    seen = []

    def note(source, config, dtype, device):
        seen.append(config)
        raise ValueError("enough")

    monkeypatch.setattr(edit_command, "new_editor", note)
    edits = write_edits(tmp_path / "edits.jsonl", 1)
    pool = tmp_path / "pool.txt"
    pool.write_text("First prompt\n\n second prompt \n")
    options = (
        *("--module", "a.b", "--n-iter", 3, "--edit-lr", 0.5, "--mask-ratio", 0.3),
        *("--act-margin", 1, 4, 2, "--act-ratio", 0.7, "--norm-constraint", "none"),
        *("--save-freq", 5, "--merge-freq", 10, "--merge-alg", "linear", "--density", 0.4),
        *("--no-retrieve", "--replay", "--calibrate", "--template", "{}?", "--chat-template"),
        *("--locality-prompts", pool, "--quirks", "published", "--batch-size", 5),
        *("--activation", "none", "--reduction", "max", "--seed", 7),
    )
    command = ("edit", model_dir, edits, "--out", tmp_path / "out", "--method", "wise")
    assert run(*command, *options)[0] == 2
    expected = WiseConfig(
        edit_module="a.b",
        n_iter=3,
        edit_lr=0.5,
        mask_ratio=0.3,
        act_margin=(1.0, 4.0, 2.0),
        act_ratio=0.7,
        norm_constraint=None,
        save_freq=5,
        merge_freq=10,
        merge_alg="linear",
        density=0.4,
        retrieve=False,
        replay=True,
        activation=None,
        reduction="max",
        quirks="published",
        seed=7,
        calibrate=True,
        templates=("{}?",),
        locality_prompts=("First prompt", "second prompt"),
        chat_template=True,
        batch_size=5,
    )
    assert seen.pop() == expected
    changed = {
        name for name, value in expected.to_dict().items() if value != WiseConfig().to_dict()[name]
    }
    assert changed == set(expected.to_dict()), "a setting that no option changes"
    run(*command, "--preset", "gpt-j-6b", "--norm-constraint", "0.5")
    assert seen.pop() == WiseConfig.preset("gpt-j-6b", norm_constraint=0.5)
    run(*command)
    assert seen.pop() == WiseConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "rome"), "method is 'rome'; choose one of ultraedit, wise"),
        (("--method", "wise", "--lr", "1"), "--lr belongs to --method ultraedit"),
        (("--method", "wise", "--tokens-per-pass", "9"), "--tokens-per-pass belongs to"),
        (("--no-retrieve",), "--no-retrieve belongs to --method wise"),
        (("--template", "{}"), "--template belongs to --method wise"),
        (("--act-margin", "1", "2", "3"), "--act-margin belongs to --method wise"),
        (("--method", "wise", "--module", "a", "--module", "b"), "WISE edits one module"),
        (("--method", "wise", "--module", "lm_hed"), "nearest are"),
        (("--method", "wise", "--merge-freq", "7"), "not a multiple of save_freq"),
        (("--method", "wise", "--template", "no slot"), "exactly once"),
        (("--method", "wise", "--norm-constraint", "x"), "--norm-constraint is 'x'"),
        (("--method", "wise", "--preset", "phi-4"), "unknown preset 'phi-4'"),
        (("--method", "wise", "--resume"), "was not saved by an editor"),
        (("--method", "wise", "--locality-prompts", "nowhere.txt"), "nowhere.txt"),
        (("--method", "wise", "--device", "gpu"), "--device gpu: "),
        (("--method", "wise", "--device", "cuda:99"), "--device cuda:99: "),
        (("--method", "wise", "--chat-template"), "the tokenizer has no chat template"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(model_dir, tmp_path, run, options, message):
    edits = write_edits(tmp_path / "edits.jsonl", 2)
    code, _, errors = run("edit", model_dir, edits, "--out", tmp_path / "out", *options)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "pyeditfast.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plot", "gaps.svg"), "end its name in .png"),
        (("--plot", "nowhere/gaps.png"), "--plot nowhere/gaps.png: there is no directory"),
        (("--json", "nowhere/scores.json"), "--json nowhere/scores.json: there is no directory"),
    ],
)
def test_evaluate_checks_places_before_any_work(tmp_path, monkeypatch, run, options, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run("evaluate", "no-model", "no-edits", *options)
    assert code == 2
    assert message in errors


def test_wise_does_not_resume_a_run_of_ultraedit(model_dir, tmp_path, run):
    edits = write_edits(tmp_path / "edits.jsonl", 2)
    out = tmp_path / "out"
    assert run("edit", model_dir, edits, "--out", out)[0] == 0
    code, _, errors = run("edit", model_dir, edits, "--out", out, "--method", "wise", "--resume")
    assert code == 2
    assert "method 'wise' is needed" in errors
    assert UltraEditor.load(out).edits == 2


def test_the_demonstration_of_wise_is_called(tmp_path, monkeypatch, run):
    calls = []
    module = types.ModuleType("pyeditfast.demo.wise_run")
    module.run_wise_demo = lambda out, *, facts, seed: calls.append((out, facts, seed)) or "done"
    monkeypatch.setitem(sys.modules, "pyeditfast.demo.wise_run", module)
    code, printed, errors = run(
        "demo", "--method", "wise", "--out", tmp_path, "--facts", 20, "--seed", 3
    )
    assert code == 0, errors
    assert printed == "done\n"
    assert calls == [(tmp_path, 20, 3)]
    code, _, errors = run("demo", "--method", "wise", "--turn-size", 5)
    assert code == 2
    assert "--turn-size belongs to --method ultraedit" in errors
    assert run("demo", "--method", "rome")[0] == 2


def test_side_memories_find_their_base_model_from_anywhere(model_dir, tmp_path, monkeypatch, run):
    edits = write_edits(tmp_path / "edits.jsonl", 2)
    monkeypatch.chdir(model_dir.parent)
    assert run("edit", model_dir.name, edits, "--out", tmp_path / "out", *OPTIONS)[0] == 0
    monkeypatch.chdir(tmp_path)
    code, printed, errors = run("evaluate", "out", edits)
    assert code == 0, errors
    assert "routed as wanted" in printed
