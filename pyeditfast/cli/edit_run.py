"""The editors of ``pyeditfast edit``: made, resumed, and what they report."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pyeditfast.cli.models import open_device, open_model

if TYPE_CHECKING:
    from pyeditfast.cli.edit_settings import Config
    from pyeditfast.cli.records import Records
    from pyeditfast.editors import EditReport, UltraEditor
    from pyeditfast.editors.wise import WiseEditor
    from pyeditfast.evaluation import Scores

    Editor: TypeAlias = UltraEditor | WiseEditor


def new_editor(source: str, config: Config, dtype: str, device: str | None) -> Editor:
    """Return an editor with ``config`` on the model that ``source`` names."""
    from pyeditfast.editors import UltraEditConfig, UltraEditor
    from pyeditfast.editors.wise import WiseEditor

    model, tokenizer = open_model(source, dtype, device)
    if isinstance(config, UltraEditConfig):
        return UltraEditor(model, tokenizer, config)
    return WiseEditor(model, tokenizer, config)


def resumed_editor(
    out: Path, source: str, config: Config, named: set[str], dtype: str, device: str | None
) -> Editor:
    """Return the editor saved in ``out``; the settings ``named`` must be those that it has.

    WISE's puts its side memories on the model that ``source`` names.
    """
    from pyeditfast import checkpoints
    from pyeditfast.editors import UltraEditConfig, UltraEditor
    from pyeditfast.editors.wise import WiseEditor

    editor: Editor
    if isinstance(config, UltraEditConfig):
        editor = UltraEditor.load(
            out, device=open_device(device), tokens_per_pass=config.tokens_per_pass
        )
    else:
        # Opening a large model to find nothing in ``out`` would take minutes.
        checkpoints.load_state(out, "wise")
        editor = WiseEditor.load(out, open_model(source, dtype, device)[0])
    changed = sorted(
        name
        for name in named - {"tokens_per_pass"}
        if getattr(config, name) != getattr(editor.config, name)
    )
    if changed:
        raise ValueError(
            f"--resume goes on with the settings of the stopped run; {', '.join(changed)} differ"
        )
    return editor


def edited_modules(config: Config) -> str:
    """Return the names of the modules that are edited."""
    from pyeditfast.editors import UltraEditConfig

    if isinstance(config, UltraEditConfig):
        return ", ".join(config.edit_modules or ())
    return str(config.edit_module)


def check_places(model: str, out: Path, report_file: Path | None, resume: bool) -> None:
    """Refuse what could not be written, or would write over something, before any work."""
    from pyeditfast.checkpoints import STATE_FILE

    if report_file is not None and not report_file.absolute().parent.is_dir():
        raise ValueError(f"--report {report_file}: there is no directory {report_file.parent}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; a directory is needed")
    edited = (out / STATE_FILE).exists()
    if not resume and (edited or (out / "config.json").exists()):
        what = "an edited model" if edited else "a model"
        raise ValueError(f"{out} holds {what}; use --resume or another --out")
    if not resume and Path(model).is_dir() and out.resolve() == Path(model).resolve():
        raise ValueError(f"--out {out} is the model itself; name another directory")
    _check_base(model)
    if not resume:
        out.mkdir(parents=True, exist_ok=True)
    if not os.access(out if out.exists() else out.absolute().parent, os.W_OK):
        raise ValueError(f"--out {out} cannot be written")


def _check_base(model: str) -> None:
    from pyeditfast.checkpoints import saved_method

    if saved_method(Path(model).expanduser()) == "wise":
        raise ValueError(
            f"{model} holds side memories of WISE; name the model that they belong to, and go on "
            "editing with --resume"
        )


def write_report(report: EditReport, first: int, report_file: Path | None) -> None:
    """Number the edits in the lists as the file does, and write the report if it is wanted."""
    for edits in (report.rejected, report.not_routed):
        edits[:] = [dataclasses.replace(edit, index=edit.index + first) for edit in edits]
    if report_file is not None:
        report_file.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")


def score(editor: Editor, records: Records) -> Scores:
    """Return the scores of the editor's model on ``records``."""
    from pyeditfast.editors.wise_config import WiseConfig
    from pyeditfast.evaluation import evaluate

    config = editor.config
    chat_template = isinstance(config, WiseConfig) and config.chat_template
    return evaluate(
        editor.model, editor.tokenizer, records.read_silently(), chat_template=chat_template
    )


def memories_told(editor: Editor) -> list[str]:
    """Return a line on each side memory: its edits and its threshold."""
    from pyeditfast.editors.report import counted
    from pyeditfast.editors.wise import WiseEditor

    if not isinstance(editor, WiseEditor):
        return []
    return [
        f"side memory {number}: {counted(len(memory.edits), 'edit')}, "
        f"threshold {memory.threshold:.4g}"
        for number, memory in enumerate(editor.memories.all())
    ]
