"""Tiny causal language models and a tokenizer, built from a seed, for tests on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "gpt2",
    "gptj",
    "gemma3",
    "phi3",
    "gpt_neox",
    "bloom",
    "opt",
    "gemma2",
)

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

_WINDOWED = ("mistral", "phi3", "gemma2", "gemma3")

_DOWN_PROJECTIONS = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.{}.fc2",
}

_SAMPLE_TEXTS = (
    "The mother tongue of the painter is French and the language of the court was Latin.",
    "Where was the architect born? The architect was born in a small town near the river.",
    "The capital of the old kingdom is a harbour city in the north of the country.",
    "The engineer works for a railway company that was founded in 1871.",
    "What instrument does the singer play? The singer plays the violin and the piano.",
    "The official religion of the island is Islam; the headquarters of the bank are in London.",
)


def tiny_tokenizer(
    texts: Sequence[str] | None = None, vocab_size: int = 512, bos: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``texts`` (a few built-in sentences when None).

    Ids 0, 1 and 2 are ``<pad>``, ``<bos>`` and ``<eos>``. Any text can be tokenized, and no id
    reaches ``vocab_size`` (few texts give fewer tokens). With ``bos=True`` the tokenizer puts
    ``<bos>`` before a text, as Llama's does, unless called with ``add_special_tokens=False``.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        _SAMPLE_TEXTS if texts is None else texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if core.get_vocab_size() > vocab_size:
        raise ValueError(f"vocab_size must be at least {core.get_vocab_size()}, got {vocab_size}")
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A",
            pair="<bos> $A <bos> $B",
            special_tokens=[("<bos>", BOS_ID)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_model(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocab_size: int = 512,
    *,
    hidden_size: int = 32,
    intermediate_size: int = 64,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 256,
    sliding_window: int | None = None,
) -> PreTrainedModel:
    """Build a model of one of ``FAMILIES`` in evaluation mode, with large weights from ``seed``.

    The weights are drawn in float32 and rounded to ``dtype``; biases and norm weights are disturbed
    too, so that none of them can be forgotten unseen. The global random state is left alone.

    ``kv_heads`` counts for llama, mistral, qwen2, phi3 and gemma; bloom's MLP is 4 times
    ``hidden_size`` wide whatever ``intermediate_size``. ``sliding_window`` is taken by mistral and
    phi3 (None: full attention) and by gemma2 and gemma3 (None: 8), whose layers alternate between a
    window (the first) and full attention.

    A float64 gemma2 gives NaN on padded rows longer than its window: Transformers takes its
    soft-capped softmax in float32, where the float64 mask value is -inf. GPT-J's attention is
    float32 at any dtype.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    if sliding_window is not None and family not in _WINDOWED:
        raise ValueError(f"{family!r} takes no sliding_window, got {sliding_window}")
    tokens = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "initializer_range": 0.2,
    }
    wide = {"intermediate_size": intermediate_size, "max_position_embeddings": context}
    grouped = {**sizes, **wide, "num_key_value_heads": kv_heads}
    gpt = {
        "vocab_size": vocab_size,
        "n_embd": hidden_size,
        "n_inner": intermediate_size,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": context,
        "initializer_range": 0.2,
    }
    gemma = {
        **grouped,
        "head_dim": hidden_size // heads,
        "query_pre_attn_scalar": hidden_size // heads,
        "sliding_window": 8 if sliding_window is None else sliding_window,
        "layer_types": [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)
        ],
    }
    class_name, arguments = {
        "llama": ("LlamaConfig", grouped),
        "mistral": ("MistralConfig", {**grouped, "sliding_window": sliding_window}),
        "qwen2": ("Qwen2Config", grouped),
        "gpt2": ("GPT2Config", gpt),
        "gptj": ("GPTJConfig", {**gpt, "rotary_dim": hidden_size // heads // 2}),
        "gemma3": ("Gemma3TextConfig", gemma),
        "phi3": ("Phi3Config", {**grouped, "sliding_window": sliding_window}),
        "gpt_neox": ("GPTNeoXConfig", {**sizes, **wide}),
        "bloom": ("BloomConfig", sizes),
        "opt": (
            "OPTConfig",
            {
                "vocab_size": vocab_size,
                "hidden_size": hidden_size,
                "word_embed_proj_dim": hidden_size,
                "ffn_dim": intermediate_size,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "max_position_embeddings": context,
                "init_std": 0.2,
            },
        ),
        # Low caps, so that the tiny logits feel them.
        "gemma2": (
            "Gemma2Config",
            {**gemma, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
        ),
    }[family]
    config = getattr(transformers, class_name)(**arguments, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    # Only parameters: rotary frequencies stay float32, as they do when a checkpoint is loaded.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def mlp_modules(model: PreTrainedModel, family: str) -> list[str]:
    """Dotted names of the last two layers' MLP down-projections, ``Conv1D`` in gpt2."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    pattern = _DOWN_PROJECTIONS.get(family, "model.layers.{}.mlp.down_proj")
    layers = model.config.num_hidden_layers
    return [pattern.format(layer) for layer in range(max(layers - 2, 0), layers)]
