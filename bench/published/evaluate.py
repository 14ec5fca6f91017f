"""Teacher-forced scores as published: padded batches and full logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from pyeditfast_published.ultraedit import (
    IGNORED_LABEL,
    evaluation_mode,
    input_device,
    pad_pairs,
    tokenize_pair,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def published_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 10,
) -> list[float]:
    """Return the share of target tokens that the model predicts, for each ``(prompt, target)``.

    A target token counts when it is the model's first choice after the prompt and the true target
    tokens before it. Sequences are batched longest first, which pads least; the scores come in the
    order of ``pairs``.

    Raises:
        ValueError: ``batch_size`` is below 1, or a prompt or target has no tokens.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    tokenized = [tokenize_pair(tokenizer, prompt, target) for prompt, target in pairs]
    order = sorted(range(len(pairs)), key=lambda i: len(tokenized[i].input_ids), reverse=True)
    scores = [0.0] * len(pairs)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            input_ids, attention_mask, labels = pad_pairs(
                [tokenized[i] for i in chosen], input_device(model)
            )
            logits = model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).logits
            labels = labels.to(logits.device)
            correct = (logits.argmax(-1) == labels).sum(-1)
            shares = correct / (labels != IGNORED_LABEL).sum(-1)
            for i, share in zip(chosen, shares.tolist(), strict=True):
                scores[i] = share
    return scores
