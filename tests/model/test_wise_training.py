"""Gradients through a routed module, and gradient checkpointing, which runs it twice."""

from __future__ import annotations

import copy

import pytest
import torch
from routed_models import FAMILIES, RoutedModel, memories_of, padded, routed_model


@pytest.fixture(params=FAMILIES)
def routed(request) -> RoutedModel:
    return routed_model(request.param, last_block=False)


def loss_of(model, batch):
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=positions, use_cache=False).logits
    return (logits.logsumexp(-1) * batch["attention_mask"]).sum()


def gradients(model):
    """Return the gradients, by the names of the parameters, and forget them."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def expected_gradients(routed):
    """Return the sum over the prompts of the gradients of the plain models."""
    total = {}
    for prompt, route in zip(routed.prompts, routed.routes, strict=True):
        model = routed.plain[route]
        loss_of(model, padded([prompt])).backward()
        for name, grad in gradients(model).items():
            if name == f"{routed.name}.weight" and route >= 0:
                # The weight in a side memory's place is not the model's.
                continue
            total[name] = total.get(name, 0) + grad
    return total


def assert_close(ours, expected):
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-5 * scale + 1e-6)


def test_gradients_are_those_of_the_memory_that_answers(routed):
    loss_of(routed.model, padded(routed.prompts)).backward()
    assert memories_of(routed.layer) == routed.routes
    assert_close(gradients(routed.model), expected_gradients(routed))
    copy.deepcopy(routed.model)


def test_gradients_reach_the_side_memory_that_answers(routed):
    sides = [side.clone().requires_grad_() for side in routed.layer.side_weights]
    routed.layer.set_memories(sides, routed.layer.thresholds.tolist())
    loss_of(routed.model, padded(routed.prompts)).backward()
    for number, side in enumerate(sides):
        grad = torch.zeros_like(side)
        for prompt, route in zip(routed.prompts, routed.routes, strict=True):
            if route == number:
                model = routed.plain[number]
                loss_of(model, padded([prompt])).backward()
                weight = gradients(model)[f"{routed.name}.weight"]
                grad += weight if weight.shape == side.shape else weight.T
        torch.testing.assert_close(side.grad, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()))


def checkpoint(routed, reentrant, dropout=0.0):
    routed.model.train()
    for part in routed.model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
    routed.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    routed.model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(routed, reentrant):
    checkpoint(routed, reentrant)
    loss_of(routed.model, padded(routed.prompts)).backward()
    assert memories_of(routed.layer) == routed.routes
    assert_close(gradients(routed.model), expected_gradients(routed))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_several_passes_before_a_backward_pass(routed, reentrant):
    # Of one shape, so that only their contents tell them apart, and with other pads and routes.
    checkpoint(routed, reentrant)
    longest = max(map(len, routed.prompts))
    backwards = padded(routed.prompts[::-1])
    assert backwards["input_ids"].shape[1] == longest
    first = loss_of(routed.model, padded(routed.prompts))
    second = loss_of(routed.model, backwards)
    assert memories_of(routed.layer) == routed.routes[::-1]
    (first + 2 * second).backward()
    expected = {name: 3 * grad for name, grad in expected_gradients(routed).items()}
    assert_close(gradients(routed.model), expected)


def test_checkpointing_of_a_pass_that_is_forgotten(routed):
    checkpoint(routed, reentrant=False)
    loss = loss_of(routed.model, padded(routed.prompts))
    with torch.no_grad():
        for token in range(40):
            routed.model(torch.tensor([[token + 5, 6]]))
    with pytest.raises(ValueError, match="none of the last 32 forward passes"):
        loss.backward()


def test_checkpointing_with_dropout():
    routed = routed_model("gpt2", last_block=False)
    grads = []
    for enabled in (False, True):
        checkpoint(routed, reentrant=False, dropout=0.3)
        if not enabled:
            routed.model.gradient_checkpointing_disable()
        torch.manual_seed(0)
        loss_of(routed.model, padded(routed.prompts)).backward()
        grads.append(gradients(routed.model))
    assert_close(*grads)


def test_autocast(routed):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(routed.model, padded(routed.prompts)).backward()
    assert memories_of(routed.layer) == routed.routes
    expected = expected_gradients(routed)
    for name, grad in gradients(routed.model).items():
        assert grad.dtype == torch.float32
        assert float((grad - expected[name]).norm() / expected[name].norm()) < 0.1
