"""Suffix replay: the same logits and gradients as the whole model, without running its prefix."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch.nn.functional import cross_entropy

from pyeditfast.editors.presets import default_modules
from pyeditfast.errors import UnsupportedWeightError
from pyeditfast.model import packing
from pyeditfast.model.capture import frozen
from pyeditfast.model.prefix import module_inputs
from pyeditfast.model.query_batch import Query, query_batch
from pyeditfast.model.runner import ModelRunner
from pyeditfast.model.suffix_replay import SuffixReplay

QUERIES = [
    Query((3, 4, 5, 6, 7), (6, 7)),
    Query((9, 8, 7), (7,)),
    Query((11, 12, 13, 14, 15, 16), (15, 16)),
]


def modules_of(family):
    names = {"gpt2": ["c_fc", "c_proj"], "llama": ["gate_proj", "up_proj", "down_proj"]}
    if family in names:
        first = "transformer.h.1.mlp." if family == "gpt2" else "model.layers.1.mlp."
        return [first + name for name in names[family]]
    return [default_modules(tiny_model(family, layers=4))[0]]


CASES = [(family, name) for family in FAMILIES for name in modules_of(family)]


def batch_for(runner, layout=None):
    layout = layout or ("packed" if runner.packs(6) else "right")
    return query_batch(QUERIES, layout).batch


def logits_of(replay, output):
    with replay.giving(output):
        return replay.runner.answer_logits(replay.batch)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_equals_the_whole_model(family, name):
    model = tiny_model(family, layers=4)
    runner = ModelRunner(model)
    batch = batch_for(runner)
    module = model.get_submodule(name)
    with frozen(model), torch.no_grad():
        replay = SuffixReplay(runner, name, batch)
        replay.drop_queries(module(replay.inputs))
        for factor in (1.0, 1.1):
            module.weight.mul_(factor)
            expected = runner.answer_logits(batch)
            found = logits_of(replay, module(replay.inputs))
            # The last block's feed-forward part sees fewer rows, which may round otherwise.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_gradients_equal_those_of_the_whole_model(family):
    model = tiny_model(family, layers=4)
    name = modules_of(family)[0]
    runner = ModelRunner(model)
    batch = batch_for(runner)
    module = model.get_submodule(name)
    module.weight.requires_grad_(True)
    (expected,) = torch.autograd.grad(runner.answer_logits(batch).sum(), module.weight)
    with frozen(model):
        replay = SuffixReplay(runner, name, batch)
        output = module(replay.inputs).detach().requires_grad_()
        (grads,) = torch.autograd.grad(logits_of(replay, output).sum(), output)
    found = replay.inputs.T @ grads if family == "gpt2" else grads.T @ replay.inputs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_losses_equal_those_of_the_whole_model(family):
    model = tiny_model(family, layers=4)
    name = modules_of(family)[0]
    runner = ModelRunner(model)
    batch = batch_for(runner)
    with frozen(model), torch.no_grad():
        replay = SuffixReplay(runner, name, batch)
        output = model.get_submodule(name)(replay.inputs)
        expected = cross_entropy(runner.answer_logits(batch), batch.targets, reduction="none")
        # The first pass still asks the model for its logits.
        for _ in range(3):
            torch.testing.assert_close(replay.answer_losses(output), expected)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_left_padded_batches(family, name):
    model = tiny_model(family, layers=4)
    runner = ModelRunner(model)
    batch = batch_for(runner, "left")
    module = model.get_submodule(name)
    with frozen(model), torch.no_grad():
        replay = SuffixReplay(runner, name, batch)
        assert replay.tokens == 18
        module.weight.mul_(1.1)
        found, expected = logits_of(replay, module(replay.inputs)), runner.answer_logits(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "left"])
def test_only_what_an_answer_sees_goes_on_behind_the_module(layout):
    model = tiny_model("llama", layers=4)
    runner = ModelRunner(model, packing=True)
    name = "model.layers.2.mlp.down_proj"
    replay = SuffixReplay(runner, name, batch_for(runner, layout))
    seen = []
    model.model.layers[3].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    output = torch.randn(replay.tokens, 32)
    logits = logits_of(replay, output)
    # 14 tokens, of which the last target of each sequence is seen by nothing.
    assert seen == [(1, 11, 32)]
    # Neither these nor pads change anything; what is seen does.
    unseen = [4, 7, 13] if layout == "packed" else [0, 5, 6, 7, 8, 11, 17]
    output[unseen] = float("nan")
    assert torch.equal(logits_of(replay, output), logits)
    output[next(slot for slot in range(replay.tokens) if slot not in unseen)] += 1.0
    assert not torch.equal(logits_of(replay, output), logits)


def test_a_part_that_does_not_give_a_row_for_each_token():
    model = tiny_model("llama", layers=4)
    model.model.layers[2].extra = torch.nn.Identity()
    model.model.layers[2].register_forward_pre_hook(
        lambda block, inputs: (block.extra(torch.zeros(3)), None)[1]
    )
    runner = ModelRunner(model)
    name = "model.layers.2.mlp.down_proj"
    batch = batch_for(runner, "left")
    with frozen(model), torch.no_grad():
        replay = SuffixReplay(runner, name, batch)
        assert replay.batch is batch
        found = logits_of(replay, model.get_submodule(name)(replay.inputs))
        torch.testing.assert_close(found, runner.answer_logits(batch), rtol=1e-5, atol=1e-5)


def test_runs_nothing_before_the_module_again():
    model = tiny_model("llama", layers=4)
    runner = ModelRunner(model, packing=True)
    name = "model.layers.2.mlp.down_proj"
    replay = SuffixReplay(runner, name, batch_for(runner))
    ran = []
    for label, part in model.named_modules():
        if label.endswith(("q_proj", "gate_proj", "up_proj", "down_proj", "lm_head")):
            part.register_forward_hook(lambda *_, label=label: ran.append(label))
    logits_of(replay, torch.zeros(replay.tokens, 32))
    assert {label.split(".")[2] for label in ran if "layers" in label} == {"2", "3"}
    # The hook sees the edited module's recorded neighbours, which do not compute.
    assert [label for label in ran if label.endswith("q_proj")] == [
        "model.layers.3.self_attn.q_proj"
    ]


@pytest.mark.parametrize("name", ["mlp", "self_attn.o_proj", "self_attn.q_proj"])
def test_what_the_last_block_needs_at_answer_positions_runs_there_alone(name):
    model = tiny_model("llama", layers=4)
    runner = ModelRunner(model, packing=True)
    part, rows = model.model.layers[3].get_submodule(name), []
    own = part.forward

    def counting(hidden_states):
        rows.append(hidden_states.shape[1])
        return own(hidden_states)

    part.forward = counting
    replay = SuffixReplay(runner, "model.layers.1.mlp.down_proj", batch_for(runner))
    output = torch.randn(replay.tokens, 32)
    replay.drop_queries(output)
    rows.clear()
    logits_of(replay, output)
    assert rows == [5]


def test_the_last_attention_answers_at_answer_positions_alone(monkeypatch):
    queries = []
    own = packing.scaled_dot_product_attention
    monkeypatch.setattr(
        packing,
        "scaled_dot_product_attention",
        lambda query, *others, **options: (
            queries.append(query.shape[2]),
            own(query, *others, **options),
        )[1],
    )
    model = tiny_model("llama", layers=4)
    runner = ModelRunner(model, packing=True)
    replay = SuffixReplay(runner, "model.layers.1.mlp.down_proj", batch_for(runner))
    queries.clear()
    logits_of(replay, torch.zeros(replay.tokens, 32))
    # No answer sees a last target token.
    longest = max(len(query) for query in QUERIES) - 1
    answers = max(len(query.targets) for query in QUERIES)
    assert queries == [longest, answers]


@pytest.mark.parametrize("layout", ["packed", "left"])
@pytest.mark.parametrize("neighbours", [False, True])
def test_queries_are_dropped_where_nothing_reads_them(layout, neighbours):
    model = tiny_model("llama", layers=4)
    queries = model.model.layers[3].self_attn.q_proj
    if neighbours:
        # As a short convolution behind the projection does, however little of it.
        queries.register_forward_hook(
            lambda module, inputs, output: output + 1e-6 * output.roll(1, dims=1)
        )
    runner = ModelRunner(model)
    batch = batch_for(runner, layout)
    name = "model.layers.1.mlp.down_proj"
    with frozen(model):
        replay = SuffixReplay(runner, name, batch)
        output = model.get_submodule(name)(replay.inputs).detach().requires_grad_()
        before = logits_of(replay, output)
        (expected,) = torch.autograd.grad(before.square().sum(), output)
        replay.drop_queries(output)
        assert runner.read_at_answers_alone == {queries: not neighbours}
        logits = logits_of(replay, output)
        (grads,) = torch.autograd.grad(logits.square().sum(), output)
    torch.testing.assert_close(logits, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, before) or not neighbours
    # What one pass found out serves the next.
    again = SuffixReplay(runner, name, batch)
    again._logits = None
    again.drop_queries(output)
    assert torch.equal(logits_of(again, output), logits)


def test_a_last_block_that_attends_twice():
    model = tiny_model("llama", layers=4)
    block = model.model.layers[3]
    block.second = copy.deepcopy(block.self_attn)
    runner = ModelRunner(model, packing=True)
    replay = SuffixReplay(runner, "model.layers.1.mlp.down_proj", batch_for(runner))
    # What the first gives elsewhere, the second may read.
    assert replay.batch.inputs["packed_layout"].read == {}


def test_leaves_no_trace_on_the_model():
    model = tiny_model("llama", layers=4)
    runner = ModelRunner(model)
    batch = batch_for(runner)
    before = runner.answer_logits(batch)
    replay = SuffixReplay(runner, "model.layers.2.mlp.down_proj", batch)
    logits_of(replay, torch.zeros(replay.tokens, 32))
    assert torch.equal(runner.answer_logits(batch), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_leaves_no_trace_after_an_error():
    model = tiny_model("llama", layers=4)
    runner = ModelRunner(model)
    replay = SuffixReplay(runner, "model.layers.2.mlp.down_proj", batch_for(runner))
    with pytest.raises(RuntimeError):
        logits_of(replay, torch.zeros(replay.tokens, 31))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_was_replaced_before_is_put_back():
    model = tiny_model("llama", layers=4)
    runner = ModelRunner(model)
    block = model.model.layers[0]
    own = block.forward
    block.forward = own
    replay = SuffixReplay(runner, "model.layers.2.mlp.down_proj", batch_for(runner))
    logits_of(replay, torch.zeros(replay.tokens, 32))
    assert vars(block)["forward"] is own


def test_module_inputs_are_what_the_module_reads():
    model = tiny_model("llama", layers=4)
    runner = ModelRunner(model)
    name = "model.layers.2.mlp.down_proj"
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = batch_for(runner)
    found = module_inputs(runner, name, batch)
    runner.answer_logits(batch)
    assert torch.equal(found, seen[-1].reshape(-1, seen[-1].shape[-1]))


def test_refuses_a_module_outside_the_blocks():
    model = tiny_model("llama")
    runner = ModelRunner(model)
    with pytest.raises(UnsupportedWeightError, match="lm_head is not inside one of the model's"):
        SuffixReplay(runner, "lm_head", batch_for(runner))
