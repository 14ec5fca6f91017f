"""Peak memory of one WISE edit beyond the model, in a process of its own (Linux only).

``python bench/peak_memory_wise.py published|pyeditfast`` prints one number, in bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peak_memory import resident
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

MODULE = "model.layers.0.mlp.down_proj"
MATRIX_BYTES = 14336 * 4096 * 2
STEPS = 3
EDIT = ("The capital of the old kingdom is", "a harbour city", "The singer plays the")


def model_of(hidden: int, intermediate: int, vocabulary: int) -> PreTrainedModel:
    """Return a bf16 Mistral of two blocks."""
    config = MistralConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        vocab_size=vocabulary,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def edit(contender: str, model: PreTrainedModel, tokenizer: object) -> object:
    """Make one edit of ``STEPS`` steps and return what holds its side memory."""
    if contender == "published":
        from pyeditfast_published.wise import PublishedWise

        editor = PublishedWise(model, tokenizer, MODULE, n_iter=STEPS)
        editor.edit(*EDIT)
        return editor
    from pyeditfast import Edit, WiseConfig, WiseEditor

    ours = WiseEditor(model, tokenizer, WiseConfig(MODULE, n_iter=STEPS, templates=["{}"]))
    prompt, target, locality = EDIT
    ours.edit([Edit(prompt, target, locality_prompt=locality)], strict=True)
    return ours


def main(contender: str) -> int:
    """Return the growth of the peak resident set over the resident set with the model in it."""
    from tiny_models import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    # Load every library and its thread buffers before measuring.
    edit(contender, model_of(512, 1024, 512), tokenizer)
    model = model_of(4096, 14336, 512)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    held = edit(contender, model, tokenizer)
    assert held is not None
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(main(sys.argv[1]))
