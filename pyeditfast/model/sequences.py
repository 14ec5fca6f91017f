"""Prompt and target as one token sequence, with the answer positions of DESIGN §1.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class AnswerSequence:
    """The input ``prompt ∥ target[:-1]`` of one fact.

    ``targets[i]`` is the token that should follow input position ``first_answer + i``; the answer
    positions run from the last prompt token to the end of the input. ``index`` is the caller's
    number for the fact.
    """

    index: int
    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def first_answer(self) -> int:
        """Return the position of the last prompt token."""
        return len(self.tokens) - len(self.targets)


def context_length(model: PreTrainedModel) -> int | None:
    """Return the number of positions that the model's configuration allows, None if not said."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(limit) if limit else None


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Return the number of token embeddings, None where they are not one matrix."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])


def build_sequences(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    limit: int | None = None,
    vocabulary: int | None = None,
    *,
    special_tokens: bool = True,
    whole_targets: bool = False,
) -> list[AnswerSequence | str]:
    """Tokenize ``(prompt, target)`` pairs; where one cannot be used, its place holds the reason.

    The prompt gets the tokenizer's special tokens (unless it has them already and
    ``special_tokens`` is False), the target one leading space and none, as published. ``limit`` is
    the longest input allowed, in tokens; ``vocabulary`` the number of token embeddings.
    ``whole_targets``: the input is going to hold the last token of the target too.
    """
    built: list[AnswerSequence | str] = [""] * len(pairs)
    usable = []
    for index, (prompt, target) in enumerate(pairs):
        if not prompt.strip():
            built[index] = "the prompt is empty"
        elif not target.strip():
            built[index] = "the target is empty"
        else:
            usable.append(index)
    if not usable:
        return built
    options: dict[str, Any] = {"padding": False, "truncation": False, "verbose": False}
    prompts = tokenizer(
        [pairs[i][0] for i in usable], add_special_tokens=special_tokens, **options
    )["input_ids"]
    targets = tokenizer([" " + pairs[i][1] for i in usable], add_special_tokens=False, **options)[
        "input_ids"
    ]
    for index, prompt_ids, target_ids in zip(usable, prompts, targets, strict=True):
        length = len(prompt_ids) + len(target_ids) - (0 if whole_targets else 1)
        if not prompt_ids:
            built[index] = f"the prompt {pairs[index][0]!r} has no tokens"
        elif not target_ids:
            built[index] = f"the target {pairs[index][1]!r} has no tokens"
        elif limit is not None and length > limit:
            built[index] = f"{length} tokens exceed the model's context of {limit}"
        elif vocabulary is not None and max(*prompt_ids, *target_ids) >= vocabulary:
            unknown = max(*prompt_ids, *target_ids)
            built[index] = f"token {unknown} is beyond the model's {vocabulary} embeddings"
        else:
            built[index] = AnswerSequence(index, (*prompt_ids, *target_ids[:-1]), tuple(target_ids))
    return built
