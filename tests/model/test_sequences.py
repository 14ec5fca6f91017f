"""Prompt and target become the input and answer positions of the published code."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from pyeditfast.model.sequences import (
    AnswerSequence,
    build_sequences,
    context_length,
    vocabulary_size,
)


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_and_answers(bos):
    tokenizer = tiny_tokenizer(bos=bos)
    (sequence,) = build_sequences(tokenizer, [("The capital is", "New Delhi")])
    prompt = tokenizer("The capital is")["input_ids"]
    target = tokenizer(" New Delhi", add_special_tokens=False)["input_ids"]
    assert isinstance(sequence, AnswerSequence)
    assert list(sequence.tokens) == prompt + target[:-1]
    assert list(sequence.targets) == target
    assert sequence.first_answer == len(prompt) - 1


@pytest.mark.parametrize(
    ("prompt", "target", "reason"),
    [
        ("", "x", "the prompt is empty"),
        (" \n", "x", "the prompt is empty"),
        ("x", "", "the target is empty"),
        ("x", "  ", "the target is empty"),
        ("word " * 40, "x", "tokens exceed the model's context of 20"),
    ],
)
def test_what_cannot_be_used_is_named(prompt, target, reason):
    good = ("The capital is", "Oslo")
    first, bad, last = build_sequences(tiny_tokenizer(), [good, (prompt, target), good], limit=20)
    assert isinstance(first, AnswerSequence)
    assert isinstance(last, AnswerSequence)
    assert (first.index, last.index) == (0, 2)
    assert isinstance(bad, str)
    assert reason in bad


def test_a_target_without_tokens():
    class Mute:
        def __call__(self, texts, add_special_tokens=True, **options):
            return {"input_ids": [[1, 2] if add_special_tokens else [] for _ in texts]}

    (reason,) = build_sequences(Mute(), [("prompt", "\u200b")])
    assert reason == "the target '\\u200b' has no tokens"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma3"])
def test_context_length(family):
    assert context_length(tiny_model(family, context=77)) == 77


def test_a_token_beyond_the_embeddings():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=512)
    assert vocabulary_size(model) == 512
    (reason,) = build_sequences(tokenizer, [("The capital is", "Oslo")], vocabulary=100)
    assert "is beyond the model's 100 embeddings" in reason
