"""The README's example runs as it stands, on what the demo leaves behind."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from facts import facts
from tiny_models import tiny_model, tiny_tokenizer

from pyeditfast import load_model

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """Return the README's examples in a folder with what the demo leaves behind."""
    demo = tmp_path / "build" / "demo"
    tiny_model("llama", layers=4).save_pretrained(demo / "base-model")
    tiny_tokenizer().save_pretrained(demo / "base-model")
    (demo / "edits.json").write_text(json.dumps([asdict(edit) for edit in facts(30)]))
    monkeypatch.chdir(tmp_path)
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(example: str) -> None:
    assert len([line for line in example.splitlines() if line and "import" not in line]) == 6
    exec(compile(example, "README.md", "exec"), {})


def test_the_example_of_ultraedit_runs(examples, tmp_path, capsys):
    run(examples[0])
    printed = capsys.readouterr().out
    assert "30 edits in 2 turns" in printed
    assert "efficacy" in printed
    assert (tmp_path / "build" / "my-model" / "model.safetensors").is_file()


def test_the_example_of_wise_runs(examples, tmp_path, capsys):
    run(examples[1])
    printed = capsys.readouterr().out
    assert "30 edits in 30 turns" in printed
    assert "side memory 0 (30 edits): gap" in printed
    load_model(tmp_path / "build" / "my-side-memories")


def test_every_file_that_the_readme_shows_is_there():
    root = Path(__file__).resolve().parents[1]
    shown = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert shown
    for name in shown:
        assert (root / name).is_file(), name


@pytest.mark.parametrize("target", ["run", "test", "bench", "gpu", "tune"])
def test_the_commands_exist(target):
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
