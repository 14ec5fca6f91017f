"""A turn of 100 CounterFact edits, and the total change over ten turns, against the published
procedure.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from pyeditfast import UltraEditConfig, UltraEditor
from pyeditfast.editors.presets import default_modules
from pyeditfast.model.edit_modules import find_edit_modules
from pyeditfast_published.ultraedit import PublishedUltraEdit

TURN = 100
MISTRAL_MODULES = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1))


def mistral_two_layers(vocab_size: int) -> PreTrainedModel:
    """Return a bf16 model of Mistral-7B's width and two of its blocks."""
    config = MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocab_size,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def small(vocab_size: int) -> PreTrainedModel:
    """Return a float32 Llama of 8 blocks and hidden size 512."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "layers": 8, "heads": 8, "kv_heads": 8}
    return tiny_model("llama", vocab_size=vocab_size, **sizes)


CASES = {
    "Mistral-shaped, 2 layers, bf16": (mistral_two_layers, MISTRAL_MODULES, 3, 7),
    "Llama, hidden 512, 8 layers, float32": (small, None, 9, 15),
}


@pytest.mark.parametrize("contender", ["published", "pyeditfast"])
@pytest.mark.parametrize("case", CASES)
def bench_turn(benchmark, case, contender, real_edits, tokenizer):
    benchmark.group = f"a turn of 100 CounterFact edits: {case}"
    benchmark.name = contender
    build, modules, published_rounds, our_rounds = CASES[case]
    model = build(len(tokenizer))
    modules = modules or default_modules(model)
    if contender == "published":
        editor = PublishedUltraEdit(model, tokenizer, list(modules))
        rounds = published_rounds

        def run(edits):
            editor.edit([(edit.prompt, edit.target) for edit in edits], turn_size=TURN)
    else:
        ours = UltraEditor(model, tokenizer, UltraEditConfig(modules))
        rounds = our_rounds

        def run(edits):
            assert ours.edit(edits).edits == TURN

    turns = iter(range(1000))

    def fresh():
        start = TURN * (next(turns) % 20)
        return (real_edits[start : start + TURN],), {}

    benchmark.pedantic(run, setup=fresh, rounds=rounds, warmup_rounds=1)


def bench_ten_turns_equal_the_published_procedure(benchmark, real_edits, tokenizer):
    benchmark.group = "ten turns of 100 CounterFact edits: Llama, hidden 64, 3 layers, float32"
    benchmark.name = "pyeditfast"
    # A change that a float32 weight can hold to 1e-5: at the published lr of 1e-6 its own spacing
    # loses more than that, in the published code as here.
    lr = 1e-4
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256)
    modules = default_modules(model)
    before = [item.weight.double().clone() for item in find_edit_modules(model, modules)]
    edits = real_edits[: 10 * TURN]
    exact = copy.deepcopy(model).double()
    PublishedUltraEdit(exact, tokenizer, list(modules), lr=lr, solve_dtype=torch.float64).edit(
        [(edit.prompt, edit.target) for edit in edits], turn_size=TURN
    )
    editor = UltraEditor(model, tokenizer, UltraEditConfig(modules, lr=lr, variance="published"))
    report = benchmark.pedantic(editor.edit, args=(edits,), rounds=1)
    worst = 0.0
    pairs = zip(find_edit_modules(exact, modules), editor.modules, before, strict=True)
    for published, ours, start in pairs:
        wanted = published.weight.double() - start
        worst = max(worst, float((ours.weight.double() - start - wanted).norm() / wanted.norm()))
    benchmark.extra_info["relative_difference_of_change"] = worst
    benchmark.extra_info["edits"] = report.edits
    benchmark.extra_info["rejected"] = len(report.rejected)
    assert worst <= 1e-5
