"""Routes of sequences that are scored in one pass: padded on either side, or packed in one row."""

from __future__ import annotations

import pytest
import torch
from routed_models import FAMILIES, RoutedModel, memories_of, padded, random_prompts, routed_model

from pyeditfast.model.packing import attention_configs, packed_attention_enabled
from pyeditfast.model.runner import ModelRunner, packed_batch, padded_batch
from pyeditfast.model.sequences import AnswerSequence
from pyeditfast.model.wise_linear import find_wise_linear, prompts_of

PACKED = ("llama", "gpt2")


@pytest.fixture(scope="module", params=FAMILIES)
def routed(request) -> RoutedModel:
    return routed_model(request.param)


def logits_of(model, batch):
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**batch, position_ids=positions, use_cache=False).logits
    return [row[real.bool()] for row, real in zip(logits, mask, strict=True)]


def plain_logits(routed, sequences):
    with torch.no_grad():
        return [
            routed.plain[route](torch.tensor([sequence])).logits[0]
            for sequence, route in zip(sequences, routed.routes, strict=True)
        ]


def assert_close(ours, expected):
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_on_either_side(routed, side):
    ours = logits_of(routed.model, padded(routed.prompts, side))
    assert memories_of(routed.layer) == routed.routes
    assert_close(ours, plain_logits(routed, routed.prompts))
    for route, gaps in zip(routed.layer.routes(), routed.gaps, strict=True):
        torch.testing.assert_close(torch.tensor(route.gaps), gaps)


def test_pads_do_not_decide_whatever_they_hold(routed):
    batch = padded(routed.prompts)
    pads = batch["attention_mask"] == 0
    logits_of(routed.model, batch)
    gaps = routed.layer.routes()
    batch["input_ids"][pads] = 77
    logits_of(routed.model, batch)
    assert [route.memory for route in gaps] == memories_of(routed.layer)
    for route, other in zip(gaps, routed.layer.routes(), strict=True):
        torch.testing.assert_close(route.gaps, other.gaps)


def with_answers(routed):
    """Return every prompt with tokens behind it that would send it elsewhere."""
    answers = random_prompts([20, 12, 13, 14, 19, 18, 17, 16], seed=11)
    return [prompt + answer for prompt, answer in zip(routed.prompts, answers, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_with_answers(routed, side):
    sequences = with_answers(routed)
    batch = padded(sequences, side)
    logits_of(routed.model, batch)
    assert memories_of(routed.layer) != routed.routes
    with routed.layer.prompts_of([len(prompt) for prompt in routed.prompts]):
        ours = logits_of(routed.model, batch)
    assert memories_of(routed.layer) == routed.routes
    assert_close(ours, plain_logits(routed, sequences))
    for route, gaps in zip(routed.layer.routes(), routed.gaps, strict=True):
        torch.testing.assert_close(torch.tensor(route.gaps), gaps)
    logits_of(routed.model, batch)
    assert memories_of(routed.layer) != routed.routes


def answer_sequences(routed):
    targets = [tuple(range(5, 5 + number % 3 + 1)) for number in range(len(routed.prompts))]
    return [
        AnswerSequence(number, (*prompt, *target[:-1]), target)
        for number, (prompt, target) in enumerate(zip(routed.prompts, targets, strict=True))
    ]


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("build", [packed_batch, padded_batch])
def test_answers_are_scored_with_the_route_of_the_prompt(family, build):
    routed = routed_model(family)
    sequences = answer_sequences(routed)
    runner = ModelRunner(routed.model)
    with torch.no_grad(), prompts_of(routed.model, [s.first_answer + 1 for s in sequences]):
        ours = runner.answer_logits(build(sequences)).split([len(s.targets) for s in sequences])
    assert memories_of(routed.layer) == routed.routes
    whole = plain_logits(routed, [s.tokens for s in sequences])
    answers = [row[s.first_answer :] for row, s in zip(whole, sequences, strict=True)]
    assert_close(ours, answers)


@pytest.mark.parametrize("family", PACKED)
def test_packed_row(family):
    routed = routed_model(family)
    sequences = [AnswerSequence(i, tuple(p), (5,)) for i, p in enumerate(routed.prompts)]
    with torch.no_grad():
        ours = ModelRunner(routed.model).answer_logits(packed_batch(sequences))
    assert memories_of(routed.layer) == routed.routes
    assert_close(ours, [row[-1] for row in plain_logits(routed, routed.prompts)])
    for route, gaps in zip(routed.layer.routes(), routed.gaps, strict=True):
        torch.testing.assert_close(torch.tensor(route.gaps), gaps)


def test_the_runner_packs_a_routed_model():
    routed = routed_model("llama")
    runner = ModelRunner(routed.model)
    with torch.no_grad():
        runner.batch([AnswerSequence(0, (5, 6, 7), (8,))])
    assert runner.packing, runner.packing_reason


def test_gradients_of_a_packed_row_stay_apart():
    # A neighbour changes neither the route nor the gradient of a sequence.
    routed = routed_model("llama")
    first = tuple(routed.prompts[0])
    grads = []
    for other in routed.prompts[1:3]:
        sequences = [AnswerSequence(0, first, (5,)), AnswerSequence(1, tuple(other), (5,))]
        batch = packed_batch(sequences)
        embedded = routed.model.get_input_embeddings()(batch.inputs.pop("input_ids")).detach()
        embedded.requires_grad_()
        with packed_attention_enabled(attention_configs(routed.model)):
            logits = routed.model(inputs_embeds=embedded, use_cache=False, **batch.inputs).logits
        loss = logits[0, : len(first)].logsumexp(-1).sum()
        grads.append(torch.autograd.grad(loss, embedded)[0])
        assert not grads[-1][0, len(first) :].any()
    torch.testing.assert_close(grads[0][0, : len(first)], grads[1][0, : len(first)])


def test_lengths_that_do_not_fit(routed):
    with routed.layer.prompts_of([3, 3]), pytest.raises(ValueError, match=r"2 prompt lengths .* 8"):
        routed.model(**padded(routed.prompts))
    with (
        pytest.raises(ValueError, match=r"lengths of prompts are \[-1\]"),
        routed.layer.prompts_of([-1]),
    ):
        pass


def test_a_model_without_a_routed_module(routed):
    plain = routed.plain[-1]
    assert find_wise_linear(plain) is None
    with prompts_of(plain, [3]):
        plain(torch.tensor([[5, 6, 7, 8]]))
