"""The texts that WISE trains on: an edit's prompt in its contexts, and unrelated prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pyeditfast.data.edit import Edit
from pyeditfast.editors.wise_config import SLOT, WiseConfig
from pyeditfast.editors.wise_training import EditQueries
from pyeditfast.model.query_batch import Query
from pyeditfast.model.sequences import (
    AnswerSequence,
    build_sequences,
    context_length,
    vocabulary_size,
)

OPENINGS = ("I", "You", "Because", "Yes", "Q: ")
CONTEXT_TOKENS = (5, 10)
"""As published, each opening is continued by so many tokens, which gives ten contexts."""

LOCALITY_POOL = (
    "The boiling point of water at sea level is",
    "In the northern hemisphere, the shortest day of the year falls in",
    "A triangle with three equal sides is called",
    "The opposite of hot is",
    "To bake bread you need flour, water, salt and",
    "The fastest land animal is",
    "The chemical symbol for gold is",
    "After Monday comes",
    "The author thanked her readers because",
    "Most birds build their nests in",
    "The square root of eighty-one is",
    "When the traffic light turns red, drivers must",
    "The main ingredient of glass is",
    "A group of musicians who play together is called",
    "The planet closest to the sun is",
    "She opened the window because the room was",
)
"""Prompts about nothing in particular, for edits that bring no locality prompt."""


def sample_templates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[str, ...]:
    """Return ``{}`` and ten contexts that the model writes, the same for the same ``seed``."""
    contexts = []
    devices = [model.device] if model.device.type == "cuda" else []
    # transformers' models have it from a mixin that PreTrainedModel does not name.
    generate: Any = model.generate
    with torch.random.fork_rng(devices), torch.inference_mode(), _plain_generation(model):
        torch.manual_seed(seed)
        for length in CONTEXT_TOKENS:
            for opening in OPENINGS:
                inputs = tokenizer(opening, return_tensors="pt").to(model.device)
                written = generate(
                    # Not all of them: some tokenizers give token types, which no such model reads.
                    inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=length,
                    do_sample=True,
                    top_k=0,
                    pad_token_id=pad_token(tokenizer),
                )
                contexts.append(str(tokenizer.decode(written[0], skip_special_tokens=True)))
    # What the model wrote may hold the slot itself.
    return (SLOT, *(f"{context.replace(SLOT, ' ')} {SLOT}" for context in contexts))


@contextlib.contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Set the model's own settings of ``generate`` aside inside a ``with`` block.

    They may ask for several answers or for beams, and a length among them is warned of every time.
    """
    own = model.generation_config
    ends = None if own is None else own.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends)
    try:
        yield
    finally:
        model.generation_config = own


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with: the tokenizer's, or one that it has."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


class PromptBuilder:
    """Turns edits into token sequences, or says why one cannot be used."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: WiseConfig,
        templates: Sequence[str],
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.templates = tuple(templates)
        self._limit = context_length(model)
        self._vocabulary = vocabulary_size(model)

    def locality_prompt(self, edit: Edit, number: int) -> str:
        """Return the edit's own locality prompt, or one of the pool, by the edit's ``number``, that
        is not the edit's prompt if there is one.
        """
        if edit.locality_prompt is not None:
            return edit.locality_prompt
        pool = self.config.locality_prompts or LOCALITY_POOL
        first = pool[number % len(pool)]
        after = pool[(number + 1) % len(pool)]
        return after if first.strip() == edit.prompt.strip() else first

    def edit_queries(self, edit: Edit, locality_prompt: str) -> EditQueries | str:
        """Return what ``edit`` is trained on, or the reason why it cannot be."""
        if locality_prompt.strip() == edit.prompt.strip():
            return "the locality prompt is the edit's own prompt"
        if not locality_prompt.strip():
            return "the locality prompt is empty"
        pairs = [(self._filled(template, edit.prompt), edit.target) for template in self.templates]
        sequences = []
        for built in self._build(pairs, whole_targets=True):
            if isinstance(built, str):
                return built
            sequences.append(Query((*built.tokens, built.targets[-1]), built.targets))
        locality = self.prompt_query(locality_prompt)
        if isinstance(locality, str):
            return f"locality prompt: {locality}"
        return EditQueries(sequences, locality)

    def prompt_query(self, prompt: str) -> Query | str:
        """Return ``prompt`` alone, or the reason why it cannot be used."""
        # One token of any target shows where the prompt ends.
        built = self._build([(self._filled(SLOT, prompt), "a")], whole_targets=False)[0]
        if isinstance(built, str):
            return built
        return Query(built.tokens[: built.first_answer + 1])

    def _build(
        self, pairs: list[tuple[str, str]], *, whole_targets: bool
    ) -> list[AnswerSequence | str]:
        return build_sequences(
            self.tokenizer,
            pairs,
            self._limit,
            self._vocabulary,
            special_tokens=not self.config.chat_template,
            whole_targets=whole_targets,
        )

    def _filled(self, template: str, prompt: str) -> str:
        # Not str.format: prompts and contexts may hold braces.
        text = template.replace(SLOT, prompt)
        if not self.config.chat_template or not prompt.strip():
            return text
        message = [{"role": "user", "content": text}]
        return str(
            self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        )
