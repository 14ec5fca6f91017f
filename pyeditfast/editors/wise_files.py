"""WISE's editor on disk: the side memories as what differs from the base model, and the state."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from pyeditfast import checkpoints
from pyeditfast.data.edit import Edit, Probe
from pyeditfast.editors.side_memories import SideMemories, SideMemory, WrittenEdit
from pyeditfast.editors.sparse_difference import decode, encode
from pyeditfast.editors.wise_config import WiseConfig
from pyeditfast.editors.wise_module import require_unrouted
from pyeditfast.model.edit_modules import EditModule, find_edit_modules

if TYPE_CHECKING:
    from pyeditfast.editors.wise import WiseEditor

METHOD = "wise"

SAMPLED = 4096
"""Elements of every parameter but the edited one that the fingerprint of a base model reads."""


def save(directory: Path, editor: WiseEditor) -> None:
    """Write the editor's side memories, state and tokenizer to ``directory``."""
    memories = editor.memories
    kinds = [
        *(("merged", memory) for memory in memories.merged),
        *(("shard", memory) for memory in memories.shards),
        *(("current", memory) for memory in [memories.current] if memory is not None),
    ]
    tensors: dict[str, Tensor] = {}
    listed = []
    for number, (kind, memory) in enumerate(kinds):
        for name, tensor in encode(memory.weight, memories.main).items():
            tensors[f"side.{number}.{name}"] = tensor
        listed.append(
            {
                "kind": kind,
                # JSON has no infinity; a memory without edits has no gap.
                "smallest_gap": memory.smallest_gap if memory.edits else None,
                "threshold": memory.threshold if memory.edits else None,
                "edits": [asdict(edit) for edit in memory.edits],
            }
        )
    state = {
        "method": METHOD,
        "config": editor.config.to_dict(),
        "templates": None if editor.templates is None else list(editor.templates),
        "base_model": _place(editor.model.config.name_or_path),
        "dtype": str(memories.main.dtype).removeprefix("torch."),
        "base_fingerprint": base_fingerprint(editor.model, _module(editor)),
        "shards_begun": memories.shards_begun,
        "edits": editor.edits,
        "records": editor.records,
        "memories": listed,
    }
    with checkpoints.staged(directory) as staging:
        editor.tokenizer.save_pretrained(staging)
        checkpoints.write_state(staging, state, tensors)


def load(
    editor_class: type[WiseEditor],
    directory: Path,
    model: PreTrainedModel | None,
    *,
    dtype: torch.dtype | str,
    device: str | None,
) -> WiseEditor:
    """Return the editor saved in ``directory``, on ``model`` or on its base model."""
    state, tensors = checkpoints.load_state(directory, METHOD)
    own_dtype = getattr(torch, state["dtype"])
    if model is None:
        place = state["base_model"]
        if not place:
            raise ValueError(f"{directory} names no base model; pass the model that was edited")
        # Saved as an absolute path where it was a directory; else it is a name on the hub.
        if Path(place).is_absolute() and not Path(place).is_dir():
            raise FileNotFoundError(
                f"the base model of {directory} is no longer at {place}; "
                "load it and pass it to WiseEditor.load"
            )
        # The files of the base model may be of another dtype than it was edited in.
        dtype = own_dtype if dtype == "auto" else dtype
        model, _ = checkpoints.load_model(place, dtype=dtype, device=device)
    require_unrouted(model)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    config = WiseConfig(**state["config"])
    assert config.edit_module is not None
    module = find_edit_modules(model, [config.edit_module])[0]
    if module.weight.dtype != own_dtype:
        raise ValueError(
            f"the side memories in {directory} are {own_dtype} and the base model's {module.name} "
            f"{module.weight.dtype}; load the base model in {own_dtype}"
        )
    if base_fingerprint(model, module) != state["base_fingerprint"]:
        raise ValueError(
            f"the side memories in {directory} belong to a base model with other weights "
            f"({state['base_model'] or 'unnamed'}); this model does not have them"
        )
    editor = editor_class(model, tokenizer, config)
    memories = SideMemories(editor.memories.main, config)
    memories.shards_begun = state["shards_begun"]
    for number, listed in enumerate(state["memories"]):
        prefix = f"side.{number}."
        parts = {name: tensors[prefix + name] for name in ("where", "values")}
        memory = SideMemory(
            decode(parts, memories.main), edits=[_written(edit) for edit in listed["edits"]]
        )
        if memory.edits:
            memory.smallest_gap, memory.threshold = listed["smallest_gap"], listed["threshold"]
        if listed["kind"] == "merged":
            memories.merged.append(memory)
        elif listed["kind"] == "shard":
            memories.shards.append(memory)
        else:
            memories.current = memory
    templates = None if state["templates"] is None else tuple(state["templates"])
    editor.restore(memories, templates, state["edits"], state["records"])
    return editor


def export(directory: Path, editor: WiseEditor) -> None:
    """Write a plain checkpoint with the one side memory in the place of the main one."""
    memories = editor.memories.all()
    if len(memories) != 1:
        raise ValueError(
            f"there are {len(memories)} side memories; a plain checkpoint takes the place of one"
        )
    if (directory / checkpoints.STATE_FILE).exists():
        raise ValueError(f"{directory} holds a saved editor; export to another directory")
    weight = editor.memories.main
    original = weight.clone()
    with checkpoints.staged(directory) as staging:
        try:
            weight.copy_(memories[0].weight)
            # Nothing is left out: the side memory is written as the main one.
            with editor.layer.suspended():
                editor.model.save_pretrained(staging)
        finally:
            weight.copy_(original)
        editor.tokenizer.save_pretrained(staging)


def base_fingerprint(model: PreTrainedModel, module: EditModule) -> str:
    """Return a digest of the edited weight and of a sample of every other parameter."""
    digest = hashlib.sha256(checkpoints.fingerprint([module]).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if flat.device.type == "meta":
            continue
        sample = flat[:: max(1, flat.numel() // SAMPLED)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _place(name: str | None) -> str | None:
    """Return a directory as an absolute path, the name of a hub (or none) as it is."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def _module(editor: WiseEditor) -> EditModule:
    assert editor.config.edit_module is not None
    return EditModule(editor.config.edit_module, editor.layer)


def _written(saved: dict[str, Any]) -> WrittenEdit:
    edit = dict(saved["edit"])
    edit["portability"] = tuple(Probe(**probe) for probe in edit["portability"])
    return WrittenEdit(Edit(**edit), saved["locality_prompt"])
