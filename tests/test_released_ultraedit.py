"""UltraEdit against the authors' own code, where a checkout of XiaojieGu/UltraEdit is at hand.

``PYEDITFAST_ULTRAEDIT=<checkout> pytest tests/test_released_ultraedit.py``. The checkout's editor
and data loader are imported as they are; what they import and these tests do not need (wandb,
omegaconf, nltk, and the file that loads a model and chooses the GPU) is empty.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from facts import facts
from tiny_models import mlp_modules, tiny_model, tiny_tokenizer

from pyeditfast_published import PublishedUltraEdit

CHECKOUT = os.environ.get("PYEDITFAST_ULTRAEDIT")
pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="PYEDITFAST_ULTRAEDIT names no checkout")

TURN, MICRO_BATCH, TURNS = 20, 5, 3
PACKAGES = {"editor": "editor", "data": "data"}
FILES = ("util", "nets")
EMPTY = {
    "wandb": {},
    "nltk": {},
    "omegaconf": {"DictConfig": SimpleNamespace},
    "model": {"make_model": None},
}


@pytest.fixture
def released(monkeypatch) -> Iterator[SimpleNamespace]:
    """Return the authors' editor and data loader."""
    assert CHECKOUT is not None
    mine = {name for name in sys.modules if name.partition(".")[0] in (*PACKAGES, *FILES)}
    for name in (*mine, *EMPTY):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, content in EMPTY.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name, folder in PACKAGES.items():
        package = ModuleType(name)
        package.__path__ = [str(Path(CHECKOUT, folder))]
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.syspath_prepend(CHECKOUT)
    from data.zsre import ZSREDataset  # type: ignore[import-not-found]
    from editor.ultraedit import ULTRAEDIT  # type: ignore[import-not-found]

    yield SimpleNamespace(Editor=ULTRAEDIT, Dataset=ZSREDataset)
    for name in list(sys.modules):
        if name.partition(".")[0] in (*PACKAGES, *FILES):
            del sys.modules[name]


def edit_as_released(
    released: SimpleNamespace,
    model: Any,
    modules: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    lr: float,
    folder: Path,
) -> None:
    """Edit ``model`` in turns with the authors' code."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    config = SimpleNamespace(
        model=SimpleNamespace(
            edit_modules=list(modules), name_or_path=str(folder / "tokenizer"), name="tiny"
        ),
        dataset=SimpleNamespace(n_edits=TURN, batch_size=MICRO_BATCH, name="facts"),
        editor=SimpleNamespace(
            lr=lr, batch_size=1024, cache_dir=str(folder), name="ultraedit", token="ans"
        ),
        num_seq=TURNS,
        editor_device="cpu",
        model_device="cpu",
    )
    model.requires_grad_(False)
    for name in modules:
        model.get_submodule(name).weight.requires_grad_(True)
    data = released.Dataset.__new__(released.Dataset)
    data.config, data.tok, data.device = config.dataset, tokenizer, "cpu"
    editor = released.Editor(config, model)
    for start in range(0, len(pairs), TURN):
        turn = [{"edit_tuples": data.tok_tuples(*pair)} for pair in pairs[start : start + TURN]]
        editor.cache(data.collate_fn(turn)["edit_tuples"])
        editor.edit_model(editor.predict_param_shifts(), False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gptj"])
def test_the_baseline_has_the_authors_bits(released, family, dtype, tmp_path):
    base = tiny_model(family, dtype)
    modules = mlp_modules(base, family)
    pairs = [(edit.prompt, edit.target) for edit in facts(TURN * TURNS)]
    lr = 1e-3
    theirs = copy.deepcopy(base)
    edit_as_released(released, theirs, modules, pairs, lr, tmp_path)
    ours = copy.deepcopy(base)
    PublishedUltraEdit(ours, tiny_tokenizer(), modules, lr=lr, micro_batch=MICRO_BATCH).edit(
        pairs, turn_size=TURN
    )
    for name in modules:
        found, expected = ours.get_submodule(name).weight, theirs.get_submodule(name).weight
        assert torch.equal(found, expected)
        assert not torch.equal(expected, base.get_submodule(name).weight)
