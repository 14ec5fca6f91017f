"""What tests of the command line share: a model on disk, an edit file, and running ``main``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from facts import facts
from tiny_models import tiny_model, tiny_tokenizer

from pyeditfast import cli


def save_tiny_llama(folder: Path) -> Path:
    """Write a tiny Llama and its tokenizer to ``folder``."""
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_edits(path: Path, count: int) -> Path:
    """Write ``count`` facts as JSON lines to ``path``."""
    records = [
        {
            "prompt": edit.prompt,
            "target": edit.target,
            "rephrase": edit.rephrase,
            "locality_prompt": edit.locality_prompt,
            "locality_target": edit.locality_target,
        }
        for edit in facts(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class CommandLine:
    """Runs ``pyeditfast`` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Return exit code, output and errors."""
        self._monkeypatch.setattr(sys, "argv", ["pyeditfast", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err
