"""WISE against the authors' own code, where a checkout of zjunlp/EasyEdit is at hand.

``PYEDITFAST_EASYEDIT=<checkout> pytest tests/test_released_wise.py``. The checkout's WISE files are
imported as they are, without the package around them, whose requirements are many.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import mlp_modules, tiny_model, tiny_tokenizer

from pyeditfast import Edit, WiseConfig, WiseEditor
from pyeditfast.ops import random_mask
from pyeditfast_published import PublishedWise

CHECKOUT = os.environ.get("PYEDITFAST_EASYEDIT")
pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="PYEDITFAST_EASYEDIT names no checkout")

PACKAGES = ("easyeditor", "easyeditor.util", "easyeditor.models", "easyeditor.models.wise")
TEMPLATES = ("{}", "The engineer said: {}", "Near the small town, in the old kingdom, {}")
MARGINS = (0.05, 6.0, 3.0)
RATIO, DENSITY, STEPS, SAVE, MERGE = 0.2, 0.53, 20, 2, 4
# A locality prompt that is longer than the longest prompt would become a target there.
EDITS = (
    ("The capital of the old kingdom is", "the harbour city", "Where was the singer?"),
    ("The singer plays", "the piano", "The bank"),
    ("The mother tongue of the painter is", "Latin", "The architect was born in"),
    ("Where was the engineer born?", "London", "The island"),
    ("The official religion of the island is", "music", "Where was the bank?"),
    ("The railway company was founded in", "1902", "The violin is"),
    ("The headquarters of the bank are in", "the north", "The painter"),
    ("The language of the court was", "French", "The river"),
)
PROMPTS = [
    text for prompt, target, other in EDITS for text in (prompt, f"{prompt} {target}", other)
]


@pytest.fixture(scope="module")
def released() -> Iterator[SimpleNamespace]:
    """Return the authors' modules ``WISE`` and ``utils``."""
    assert CHECKOUT is not None
    before = set(sys.modules)
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(Path(CHECKOUT, *name.split(".")))]
        sys.modules[name] = package
    try:
        from easyeditor.models.wise import WISE, utils  # type: ignore[import-not-found]

        yield SimpleNamespace(WISE=WISE, utils=utils)
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("easyeditor"):
                del sys.modules[name]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Drop what the authors' code prints at every step."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def mask(shard: int, shape: torch.Size) -> torch.Tensor:
    """Return the mask of a shard, ``[d_out, d_in]``."""
    return random_mask(shard, RATIO, shape)


class Released:
    """The authors' editor after all of ``EDITS``, with the masks of ours."""

    def __init__(self, modules: SimpleNamespace, model: Any, name: str, retrieve: bool) -> None:
        modules.WISE.edit_history, modules.WISE.merge_group_edit_history = [], []
        alpha, beta, gamma = MARGINS
        settings = SimpleNamespace(
            **{"edit_lr": 1.0, "n_iter": STEPS, "mask_ratio": RATIO, "norm_constraint": 1.0},
            **{"alpha": alpha, "beta": beta, "gamma": gamma, "act_ratio": 0.88},
            **{"save_freq": SAVE, "merge_freq": MERGE, "merge_alg": "ties", "densities": DENSITY},
            **{"weights": 1.0, "retrieve": retrieve, "replay": False, "batch_size": 1},
            **{"objective_optimization": "only_label", "use_chat_template": False},
            **{"inner_params": [re.sub(r"\.(\d+)\.", r"[\1].", name) + ".weight"]},
            **{"device": "cpu", "model_name": model.config.model_type, "sequential_edit": True},
        )
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = "left"
        with silent():
            for number, (prompt, target, locality_prompt) in enumerate(EDITS):
                self.editor = modules.WISE.WISE(settings, model, "cpu")
                adapter = self.editor.get_adapter_layer()
                adapter.generate_activation_mask = self._mask(adapter, number // SAVE)
                request = {"prompt": prompt, "target_new": target, "loc_prompt": locality_prompt}
                tokens, *gap_masks = modules.utils.tokenize(
                    [request], tokenizer, "cpu", TEMPLATES, settings
                )
                self.editor.edit(settings, tokens, *gap_masks)
        self.adapter = self.editor.get_adapter_layer()

    @staticmethod
    def _mask(adapter: Any, shard: int) -> Any:
        def set_mask(ratio: float) -> None:
            weight = adapter.new_weight
            linear = isinstance(adapter.layer, torch.nn.Linear)
            drawn = mask(shard, weight.shape if linear else weight.mT.shape)
            adapter.weight_mask = (drawn if linear else drawn.mT).reshape(-1).long()

        return set_mask

    @property
    def thresholds(self) -> list[float]:
        return [0.88 * gaps.min_act() for gaps in self.adapter.memory_mean_act]

    def logits(self, **inputs: Any) -> torch.Tensor:
        with torch.no_grad(), silent():
            logits: torch.Tensor = self.editor(**inputs).logits
        return logits


def baseline(model: Any, name: str, retrieve: bool) -> PublishedWise:
    """Return the baseline of ``bench/published`` after all of ``EDITS``."""
    weight = model.get_submodule(name).weight
    linear = isinstance(model.get_submodule(name), torch.nn.Linear)
    shape = weight.shape if linear else weight.mT.shape
    result = PublishedWise(
        model,
        tiny_tokenizer(),
        name,
        **{"templates": TEMPLATES, "n_iter": STEPS, "act_margin": MARGINS, "retrieve": retrieve},
        **{"save_freq": SAVE, "merge_freq": MERGE, "density": DENSITY, "quirks": "published"},
        mask=lambda shard: mask(shard, shape),
    )
    for edit in EDITS:
        result.edit(*edit)
    return result


def ours(model: Any, name: str, retrieve: bool) -> WiseEditor:
    """Return the fast editor after all of ``EDITS``."""
    config = WiseConfig(
        name,
        **{"templates": TEMPLATES, "n_iter": STEPS, "act_margin": MARGINS, "retrieve": retrieve},
        **{"save_freq": SAVE, "merge_freq": MERGE, "density": DENSITY, "quirks": "published"},
    )
    editor = WiseEditor(model, tiny_tokenizer(), config)
    edits = [Edit(prompt, target, locality_prompt=other) for prompt, target, other in EDITS]
    for edit in edits:
        editor.edit([edit], strict=True)
    return editor


def tokens_of(prompt: str) -> dict[str, torch.Tensor]:
    encoded = tiny_tokenizer()(prompt, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "retrieve"),
    # The authors' code cannot run a GPT-2 that has retrieved memories.
    [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False), ("gpt2", False)],
)
def test_the_baseline_has_the_authors_bits(released, family, retrieve, dtype):
    base = tiny_model(family, dtype=dtype)
    name = mlp_modules(base, family)[-2]
    theirs = Released(released, copy.deepcopy(base), name, retrieve)
    again = baseline(copy.deepcopy(base), name, retrieve)
    main = base.get_submodule(name).weight
    if retrieve:
        memories = theirs.adapter.memory_weight
        assert len(again.memories) == len(memories) == len(EDITS) // MERGE
        for found, expected in zip(again.memories, memories, strict=True):
            assert torch.equal(found, expected)
            assert not torch.equal(expected, main)
        assert again.memory_thresholds == theirs.thresholds
    else:
        assert torch.equal(again.merged_weight, theirs.adapter.layer.weight)
        assert not torch.equal(again.merged_weight, main)
    with torch.no_grad():
        for prompt in PROMPTS:
            inputs = tokens_of(prompt)
            assert torch.equal(again.model(**inputs).logits, theirs.logits(**inputs))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_fast_editor_has_the_authors_memories_and_routes(released, family):
    # In float64: in float32 the large weights of a tiny model amplify what rounding differs by.
    base = tiny_model(family, dtype=torch.float64)
    name = mlp_modules(base, family)[-2]
    theirs = Released(released, copy.deepcopy(base), name, retrieve=True)
    editor = ours(copy.deepcopy(base), name, retrieve=True)
    main = base.get_submodule(name).weight
    memories = [memory.weight for memory in editor.memories.merged]
    for found, expected in zip(memories, theirs.adapter.memory_weight, strict=True):
        difference = (found - expected).norm() / (expected - main).norm()
        assert difference.item() <= 1e-8
    thresholds = [memory.threshold for memory in editor.memories.merged]
    assert thresholds == pytest.approx(theirs.thresholds, rel=1e-6)
    with torch.no_grad():
        for prompt in PROMPTS:
            inputs = tokens_of(prompt)
            found, expected = editor.model(**inputs).logits, theirs.logits(**inputs)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
