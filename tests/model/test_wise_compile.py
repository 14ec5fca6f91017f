"""A compiled model routes as the model does, without a graph break and without compiling each step
anew.
"""

from __future__ import annotations

import pytest
import torch
from routed_models import (
    RoutedModel,
    generate,
    memories_of,
    padded,
    random_prompts,
    routed_model,
)
from transformers import CompileConfig, DynamicCache

counters = torch._dynamo.utils.counters


@pytest.fixture
def routed(request) -> RoutedModel:
    torch._dynamo.reset()
    counters.clear()
    return routed_model(request.param, layers=1)


def families(*names):
    """Compiling takes seconds: not every test compiles a model of every family."""
    return pytest.mark.parametrize("routed", names, indirect=True)


def batch_of(prompts, more=0):
    batch = padded(prompts)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, more), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": positions}


@families("gpt2")
def test_forward(routed):
    compiled = torch.compile(routed.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for prompts in (routed.prompts, random_prompts([4, 6, 2], seed=2), routed.prompts):
            ours = compiled(**batch_of(prompts)).logits
            routes = routed.layer.routes()
            theirs = routed.model(**batch_of(prompts)).logits
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert memories_of(routed.layer) == [route.memory for route in routes]
    assert memories_of(routed.layer) == routed.routes
    # One for the first shape, one for all others.
    assert counters["stats"]["unique_graphs"] <= 2


@families("gpt2", "gptj")
def test_gradients(routed):
    compiled = torch.compile(routed.model, backend="aot_eager", fullgraph=True)
    grads = []
    for model in (routed.model, compiled):
        batch = batch_of(routed.prompts)
        logits = model(**batch, use_cache=False).logits
        (logits.logsumexp(-1) * batch["attention_mask"]).sum().backward()
        grads.append({name: p.grad for name, p in routed.model.named_parameters()})
        routed.model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5 * scale + 1e-6)


@families("llama")
@pytest.mark.parametrize(("made_by", "size"), [("the caller", 12), ("the model", 4)])
def test_decoding_by_hand(routed, made_by, size):
    compiled = torch.compile(routed.model, backend="eager", fullgraph=True)
    cache = DynamicCache() if made_by == "the caller" else None
    steps = 8
    whole = batch_of(routed.prompts, steps)
    answers = []
    with torch.no_grad():
        for first in range(0, 12, size):
            output = one_pass(compiled, whole, first, first + size, cache)
            cache = output.past_key_values
        for step in range(steps):
            token = output.logits[:, -1:].argmax(-1)
            answers.append(token)
            whole["input_ids"] = torch.cat([whole["input_ids"], token], 1)
            output = one_pass(compiled, whole, 12 + step, 13 + step, cache)
    assert torch.cat(answers, 1).tolist() == routed.expected(max_new_tokens=steps)
    assert memories_of(routed.layer) == routed.routes
    # The first pass, later pieces, and decoding, each in one fixed and one variable shape.
    assert counters["stats"]["unique_graphs"] <= 5


def one_pass(model, whole, first, last, cache):
    return model(
        whole["input_ids"][:, first:last],
        attention_mask=whole["attention_mask"][:, :last],
        position_ids=whole["position_ids"][:, first:last],
        past_key_values=cache,
        use_cache=True,
    )


@families("gptj", "gpt2")
def test_generate_compiles_its_decoding(routed):
    # As Transformers does by itself on a GPU.
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    assert generate(routed.model, routed.prompts, **options) == routed.expected()
    assert counters["stats"]["unique_graphs"] == 1
    backwards = routed.prompts[::-1]
    assert generate(routed.model, backwards, **options) == routed.expected()[::-1]
    assert memories_of(routed.layer) == routed.routes[::-1]
    assert counters["stats"]["unique_graphs"] == 1


@families("llama")
def test_generate_of_a_compiled_model(routed):
    compiled = torch.compile(routed.model, backend="eager")
    assert generate(compiled, routed.prompts) == routed.expected()


def storage(value):
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None


def overwriting(graph, inputs):
    """Run a graph as a CUDA graph is replayed: the results of the run before are lost."""
    results = []

    def run(*arguments):
        for result in results:
            result.fill_(1)
        results.clear()
        given = {storage(argument) for argument in arguments}
        outputs = graph(*arguments)
        results.extend(output for output in outputs if storage(output) not in given | {None})
        return outputs

    return run


@families("llama")
def test_replayed_graphs_do_not_overwrite_a_decision(routed):
    config = CompileConfig(backend=overwriting, mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    ours = generate(routed.model, routed.prompts, prefill_chunk_size=4, **options)
    assert ours == routed.expected()
    assert memories_of(routed.layer) == routed.routes
