"""Losses at answer positions: those of the logits, whatever a model makes of its head's output."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch.nn.functional import cross_entropy

from pyeditfast.backends import backend
from pyeditfast.model import runner as runner_module
from pyeditfast.model.query_batch import Query, query_batch
from pyeditfast.model.runner import ModelRunner

BATCH = query_batch([Query((3, 14, 15, 92), (65, 35)), Query((8, 9, 79), (32,))], "right").batch


@pytest.fixture
def in_one_op(monkeypatch):
    """Return a list that has an entry for each pass whose head and loss were one op."""
    calls = []
    own = runner_module.linear_cross_entropy
    monkeypatch.setattr(
        runner_module,
        "linear_cross_entropy",
        lambda *arguments: (calls.append(1), own(*arguments))[1],
    )
    return calls


def check(model, passes=3):
    """Require the losses of the logits in several passes; return the last."""
    runner = ModelRunner(model)
    logits = runner.answer_logits(BATCH).float()
    expected = cross_entropy(logits, BATCH.targets, reduction="none")
    for _ in range(passes):
        found = runner.answer_losses(BATCH)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, in_one_op):
    check(tiny_model(family))
    # Gemma 2 caps its logits.
    assert len(in_one_op) == (0 if family == "gemma2" else 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, in_one_op):
    runner = ModelRunner(tiny_model("llama", dtype=dtype))
    logits = runner.answer_logits(BATCH)
    exact = logits if dtype == torch.float64 else logits.float()
    expected = cross_entropy(exact, BATCH.targets, reduction="none")
    assert all(torch.equal(runner.answer_losses(BATCH), expected) for _ in range(2))
    assert len(in_one_op) == 2


def test_every_pass_has_the_same_bits(in_one_op):
    runner = ModelRunner(tiny_model("llama"))
    first, *others = (runner.answer_losses(BATCH) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def after_the_head(change):
    """Return what lets a model change its output."""

    def apply(model):
        own = model.forward

        def forward(*args, **options):
            output = own(*args, **options)
            change(output)
            return output

        model.forward = forward

    return apply


def scaled(output):
    output.logits = output.logits * 0.5


def scaled_in_place(output):
    output.logits.mul_(0.5)


def cut(output):
    output.logits = output.logits[..., :200]


def with_a_hook(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)


def with_a_hook_before(model):
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))


def with_another_forward(model):
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden) * 0.5


def of_another_class(model):
    class Halved(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 0.5

    model.lm_head.__class__ = Halved


@pytest.mark.parametrize(
    "change",
    [
        *map(after_the_head, (scaled, scaled_in_place, cut)),
        with_a_hook,
        with_a_hook_before,
        with_another_forward,
        of_another_class,
    ],
)
def test_a_model_that_does_more_than_its_head(change, in_one_op):
    plain = check(tiny_model("llama"))
    in_one_op.clear()
    model = tiny_model("llama")
    change(model)
    with torch.no_grad():
        assert (check(model) - plain).abs().max() > 1e-3
    assert in_one_op == []


def test_a_hook_that_comes_later(in_one_op):
    model = tiny_model("llama")
    runner = ModelRunner(model)
    before = runner.answer_losses(BATCH)
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    hooked = runner.answer_losses(BATCH)
    handle.remove()
    assert not torch.allclose(hooked, before)
    assert torch.equal(runner.answer_losses(BATCH), before)


def test_a_head_with_a_bias_and_gradients(in_one_op):
    model = tiny_model("gptj")
    embedded = []
    model.transformer.h[-1].register_forward_hook(lambda *call: embedded.append(call[2]))
    runner = ModelRunner(model)

    def gradient(losses):
        hidden = embedded[-1][0] if isinstance(embedded[-1], tuple) else embedded[-1]
        return torch.autograd.grad(losses.sum(), hidden)[0]

    expected = gradient(cross_entropy(runner.answer_logits(BATCH), BATCH.targets, reduction="none"))
    for name in ("torch", "auto"):
        with backend(name):
            found = gradient(runner.answer_losses(BATCH))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_head_is_whole_after_an_error(monkeypatch):
    model = tiny_model("llama")
    runner = ModelRunner(model)
    runner.answer_losses(BATCH)

    def fail(*args, **options):
        raise RuntimeError("in the middle")

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="in the middle"):
        broken.setattr(model.model.layers[1], "forward", fail)
        runner.answer_losses(BATCH)
    assert "forward" not in vars(model.lm_head)
    assert not model.lm_head._forward_pre_hooks
