"""One WISE edit against the published procedure: time, and the side memory that comes out."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import peak_memory_wise
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from pyeditfast import WiseConfig, WiseEditor
from pyeditfast.editors.side_memories import SideMemories
from pyeditfast.ops import random_mask
from pyeditfast_published.wise import PublishedWise

MODULE = "model.layers.13.mlp.down_proj"
STEPS = 70
TEMPLATES = (
    "{}",
    *(
        f"{opening} {rest} {{}}"
        for opening in ("I", "You", "Because", "Yes", "Q:")
        for rest in ("think that this is", "know about the river and the old town, and then")
    ),
)
"""As many contexts and about as long as those that the published code samples."""


def sixteen_layers() -> PreTrainedModel:
    """Return a float32 Llama of 16 blocks, hidden size 384 and Llama's own vocabulary size."""
    config = LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def ours(model: PreTrainedModel, tokenizer, quirks: str, steps: int = STEPS) -> WiseEditor:
    config = WiseConfig(MODULE, n_iter=steps, templates=TEMPLATES, quirks=quirks)
    return WiseEditor(model, tokenizer, config)


def theirs(model: PreTrainedModel, tokenizer, quirks: str) -> PublishedWise:
    shape = model.get_submodule(MODULE).weight.shape
    mask = random_mask(0, 0.2, shape)
    return PublishedWise(
        model, tokenizer, MODULE, n_iter=STEPS, templates=TEMPLATES, quirks=quirks, mask=mask
    )


@pytest.mark.parametrize("contender", ["published", "pyeditfast"])
@pytest.mark.parametrize("quirks", ["none", "published"])
def bench_one_edit(benchmark, contender, quirks, real_edits, tokenizer):
    benchmark.group = f"a WISE edit: Llama, hidden 384, 16 layers, float32, quirks {quirks}"
    benchmark.name = contender
    base = sixteen_layers()
    edit = real_edits[0]
    editor = ours(copy.deepcopy(base), tokenizer, quirks)
    if contender == "published":
        other = theirs(base, tokenizer, quirks)

        def fresh():
            with torch.no_grad():
                other.side_weight.copy_(editor.memories.main)

        def run():
            other.edit(edit.prompt, edit.target, edit.locality_prompt)

        # Two steps warm up: a whole edit takes long.
        other.n_iter = 2
        run()
        other.n_iter = STEPS
        benchmark.pedantic(run, setup=fresh, rounds=3)
        return

    def fresh():
        editor.restore(SideMemories(editor.memories.main, editor.config), TEMPLATES, 0, 0)

    def run():
        assert editor.edit([edit]).edits == 1

    ours(copy.deepcopy(base), tokenizer, quirks, steps=2).edit([edit])
    benchmark.pedantic(run, setup=fresh, rounds=9)
    expected = theirs(base, tokenizer, quirks)
    expected.edit(edit.prompt, edit.target, edit.locality_prompt)
    main = editor.memories.main
    found = editor.memories.all()[0].weight - main
    wanted = expected.side_weight.detach() - main
    difference = float((found - wanted).norm() / wanted.norm())
    benchmark.extra_info["relative_difference_of_change"] = difference
    assert difference <= 1e-5


@pytest.mark.parametrize("contender", ["published", "pyeditfast"])
def bench_memory_of_an_edit(benchmark, contender):
    benchmark.group = "a WISE edit: 14336 × 4096 bf16, two blocks, three steps"
    benchmark.name = contender
    script = Path(peak_memory_wise.__file__)

    def run():
        return subprocess.run(
            [sys.executable, str(script), contender], capture_output=True, text=True, check=True
        ).stdout

    matrices = float(benchmark.pedantic(run, rounds=1)) / peak_memory_wise.MATRIX_BYTES
    benchmark.extra_info["peak_matrices_beyond_the_model"] = round(matrices, 2)
    if contender == "pyeditfast":
        assert matrices <= 2.3
