"""Edited models on disk: Transformers' files, plus the editor's state in safetensors and JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pyeditfast.model.edit_modules import EditModule

STATE_FILE = "pyeditfast.json"
TENSOR_FILE = "pyeditfast.safetensors"
STAGING = ".saving-"
FORMAT = 1


def fingerprint(modules: Sequence[EditModule]) -> str:
    """Return a digest of the names and every byte of the edited weights."""
    digest = hashlib.sha256()
    for item in modules:
        digest.update(item.name.encode())
        stored = item.module.weight.data
        assert isinstance(stored, Tensor)
        digest.update(stored.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Give a folder whose files are moved into ``directory`` at the end of a ``with`` block, the
    JSON state last.

    An interrupted save leaves either the old state or a fingerprint that does not fit.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; a directory is needed")
    directory.mkdir(parents=True, exist_ok=True)
    for abandoned in directory.glob(f"{STAGING}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=directory))
    try:
        yield staging
        for source in sorted(staging.iterdir(), key=lambda path: path.name == STATE_FILE):
            if source.is_dir():
                shutil.rmtree(directory / source.name, ignore_errors=True)
            os.replace(source, directory / source.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    modules: Sequence[EditModule],
    state: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Write model, tokenizer and state to ``directory``, see ``staged``."""
    with staged(directory) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_state(staging, {**state, "fingerprint": fingerprint(modules)}, tensors)


def write_state(folder: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the JSON state and the tensors of an editor."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / TENSOR_FILE)
    record = {"format": FORMAT, **state}
    (folder / STATE_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def saved_method(directory: Path) -> str | None:
    """Return the method of the editor that was saved in ``directory``, None if none was."""
    method = _saved(directory, "method")
    return method if isinstance(method, str) else None


def saved_config(directory: Path) -> dict[str, Any]:
    """Return the settings of the editor that was saved in ``directory``, none if none was."""
    config = _saved(directory, "config")
    return config if isinstance(config, dict) else {}


def _saved(directory: Path, name: str) -> Any:
    path = directory / STATE_FILE
    return json.loads(path.read_text()).get(name) if path.is_file() else None


def load_state(directory: Path, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON state and the tensors of an editor of ``method``."""
    path = directory / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {STATE_FILE}; it was not saved by an editor")
    try:
        state = json.loads(path.read_text())
        if state.get("format") != FORMAT or state.get("method") != method:
            raise ValueError(
                f"{path} is of format {state.get('format')!r}, method {state.get('method')!r}; "
                f"format {FORMAT}, method {method!r} is needed"
            )
        return state, load_file(directory / TENSOR_FILE)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{directory} holds a damaged save: {error}") from error


def check_fingerprint(
    directory: Path, state: dict[str, Any], modules: Sequence[EditModule]
) -> None:
    """Raise ``ValueError`` unless the edited weights are those that ``state`` was saved with."""
    if fingerprint(modules) != state["fingerprint"]:
        raise ValueError(
            f"the weights in {directory} are not those that {STATE_FILE} was saved with; "
            "the save was interrupted or the model replaced"
        )


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the causal language model and the tokenizer of a directory or hub name.

    ``dtype="auto"`` keeps the dtype of the files. ``device``: None leaves the model on the CPU,
    ``"auto"`` spreads it over all devices (this needs the package accelerate), any other names one
    device. No remote code is run.
    """
    spread = device if device == "auto" else None
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, device_map=spread, trust_remote_code=False
    )
    if device is not None and spread is None:
        torch.nn.Module.to(model, device)
    return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
