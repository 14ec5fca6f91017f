"""What routing costs in serving: prefill and cached decoding, against the unedited model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from transformers import DynamicCache

from pyeditfast.model.wise_linear import install
from pyeditfast_published.wise_layer import PublishedWiseLayer

MODULE = "model.layers.6.mlp.down_proj"
PROMPT, DECODED = 64, 16
CONTENDERS = ["unedited", "published", "pyeditfast"]


def serving_model(contender: str):
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "layers": 8, "heads": 8, "kv_heads": 8}
    model = tiny_model("llama", vocab_size=8000, **sizes)
    module = model.get_submodule(MODULE)
    torch.manual_seed(1)
    side = module.weight.detach() + 0.01 * torch.randn_like(module.weight)
    if contender == "pyeditfast":
        layer = install(model, MODULE, activation="silu", reduction="auto")
        layer.set_memories([side], [0.0])
    elif contender == "published":
        layer = PublishedWiseLayer(module, torch.nn.SiLU(), act_ratio=1.0, retrieve=True)
        with torch.no_grad():
            layer.side_weight.copy_(side)
        layer.smallest_gap = 0.0
        model.model.layers[6].mlp.down_proj = layer
    return model


def group(benchmark, what: str, contender: str, batch: int, tokens: int) -> None:
    benchmark.group = (
        f"serving, {what}, batch {batch}: Llama, hidden 512, 8 layers, one side memory"
    )
    benchmark.name = contender
    benchmark.extra_info["tokens"] = tokens


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_prefill(benchmark, contender, batch):
    model = serving_model(contender)
    group(benchmark, f"prefill of {PROMPT} tokens", contender, batch, batch * PROMPT)

    def fresh():
        return (torch.randint(3, 8000, (batch, PROMPT)),), {}

    @torch.inference_mode()
    def run(tokens):
        model(tokens, logits_to_keep=1)

    benchmark.pedantic(run, setup=fresh, rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_decode(benchmark, contender, batch):
    model = serving_model(contender)
    group(benchmark, f"decoding {DECODED} tokens", contender, batch, batch * DECODED)

    @torch.inference_mode()
    def fresh():
        cache = DynamicCache()
        model(torch.randint(3, 8000, (batch, PROMPT)), past_key_values=cache, logits_to_keep=1)
        return (cache, torch.randint(3, 8000, (batch, 1))), {}

    @torch.inference_mode()
    def run(cache, token):
        for _ in range(DECODED):
            model(token, past_key_values=cache)

    benchmark.pedantic(run, setup=fresh, rounds=15, warmup_rounds=2)
