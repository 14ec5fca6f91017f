"""Scores equal the published ones, and exact match equals greedy generation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from facts import facts
from tiny_models import mlp_modules, tiny_model, tiny_tokenizer

from pyeditfast import Edit, Probe, UltraEditConfig, UltraEditor, evaluate
from pyeditfast_published.evaluate import published_scores


@pytest.fixture(scope="module")
def edited():
    """Return a tiny model that has learnt most of forty facts, its tokenizer and the facts."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=256)
    tokenizer = tiny_tokenizer()
    edits = facts(40)
    config = UltraEditConfig(mlp_modules(model, "llama"), lr=1e-2, turn_size=40)
    editor = UltraEditor(model, tokenizer, config)
    editor.edit(edits)
    return model, tokenizer, edits


def pairs(edits, kind):
    return {
        "efficacy": [(edit.prompt, edit.target) for edit in edits],
        "generalization": [(edit.rephrase, edit.target) for edit in edits],
        "specificity": [(edit.locality_prompt, edit.locality_target) for edit in edits],
    }[kind]


@pytest.mark.parametrize("tokens_per_pass", [None, 40])
def test_scores_equal_the_published_ones(edited, tokens_per_pass):
    model, tokenizer, edits = edited
    scores = evaluate(model, tokenizer, edits, tokens_per_pass=tokens_per_pass)
    for kind in ("efficacy", "generalization", "specificity"):
        expected = published_scores(model, tokenizer, pairs(edits, kind))
        assert getattr(scores, kind) == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert 0.2 < scores.efficacy <= 1
    assert scores.counts["efficacy"] == 40
    assert scores.portability is None


def test_exact_match_is_what_greedy_generation_gives(edited):
    model, tokenizer, edits = edited
    right = 0
    for edit in edits:
        prompt = tokenizer(edit.prompt, return_tensors="pt")
        target = tokenizer(" " + edit.target, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            generated = model.generate(
                **prompt, max_new_tokens=len(target), do_sample=False, eos_token_id=None
            )
        right += generated[0, prompt["input_ids"].shape[1] :].tolist() == target
    scores = evaluate(model, tokenizer, edits, exact=True)
    assert 0 < right < len(edits)
    assert scores.exact["efficacy"] == pytest.approx(right / len(edits))
    assert evaluate(model, tokenizer, edits).exact is None


def test_missing_and_unusable_probes(edited):
    model, tokenizer, _ = edited
    edits = [
        Edit("The capital is", "Oslo", locality_prompt="without an answer"),
        Edit("", "Oslo", rephrase="word " * 400),
        Edit("Where? In", "Paris", portability=(Probe("a", "b"), Probe("c", "d"))),
    ]
    scores = evaluate(model, tokenizer, edits)
    assert scores.skipped == 2
    assert scores.counts == {
        "efficacy": 2,
        "generalization": 0,
        "specificity": 0,
        "portability": 2,
    }
    assert scores.generalization is None
    assert scores.specificity is None
    assert str(evaluate(model, tokenizer, [])) == "nothing to score"


def test_the_model_is_not_changed(edited):
    model, tokenizer, edits = edited
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    evaluate(model, tokenizer, edits[:5])
    assert model.training
    model.eval()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_many_edits_are_scored_in_blocks(edited, monkeypatch):
    model, tokenizer, edits = edited
    whole = evaluate(model, tokenizer, edits)
    monkeypatch.setattr("pyeditfast.evaluation.BLOCK", 7)
    blocks = evaluate(model, tokenizer, iter(edits))
    for field in dataclasses.fields(whole):
        assert getattr(blocks, field.name) == pytest.approx(getattr(whole, field.name))


def test_prompts_can_be_put_into_the_chat_template(edited):
    model, _, edits = edited
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = (
        "{% for message in messages %}<bos>Q: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    chat = evaluate(model, tokenizer, edits, exact=True, chat_template=True)
    # The template brings its own <bos>, which must not come twice.
    filled = [
        dataclasses.replace(
            edit,
            prompt=f"<bos>Q: {edit.prompt}\nA:",
            rephrase=f"<bos>Q: {edit.rephrase}\nA:",
            locality_prompt=f"<bos>Q: {edit.locality_prompt}\nA:",
        )
        for edit in edits
    ]
    assert chat == evaluate(model, tiny_tokenizer(), filled, exact=True)
    assert chat != evaluate(model, tokenizer, edits, exact=True)
    empty = evaluate(model, tokenizer, [Edit(" ", "Oslo")], chat_template=True)
    assert empty.skipped == 1
