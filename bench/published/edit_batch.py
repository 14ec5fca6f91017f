"""The sequences of a WISE edit as one padded batch, as the released code lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyeditfast_published.ultraedit import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EditBatch:
    """The sequences of one edit, left-padded, the locality prompt last.

    ``input_ids``, ``attention_mask`` and ``labels`` are ``[rows, tokens]`` int64; only target
    tokens have a label, at their own position. ``targets`` is the number of target tokens of a row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    targets: int


def edit_batch(
    tokenizer: PreTrainedTokenizerBase,
    templates: Sequence[str],
    prompt: str,
    target: str,
    locality_prompt: str,
    device: torch.device | str = "cpu",
) -> EditBatch:
    """Tokenize and left-pad ``template.format(prompt) ∥ " " + target`` and the locality prompt.

    Prompts are tokenized with the tokenizer's defaults, the target without special tokens; all of
    its tokens are in the sequence. The released code tokenizes prompt and target as one text.

    Raises:
        ValueError: a prompt or the target has no tokens, or the locality prompt is the prompt.
    """
    if locality_prompt == prompt:
        raise ValueError(f"the locality prompt must not be the edit prompt, got {prompt!r} twice")
    target_ids = list(tokenizer(" " + target, add_special_tokens=False)["input_ids"])
    prompts = [*(template.format(prompt) for template in templates), locality_prompt]
    rows = [list(tokenizer(text)["input_ids"]) for text in prompts]
    if not prompt.strip() or not target.strip() or not target_ids or not all(rows):
        raise ValueError(
            f"prompt {prompt!r}, target {target!r} and locality prompt {locality_prompt!r} have "
            f"{len(rows[0])}, {len(target_ids)} and {len(rows[-1])} tokens; each needs at least one"
        )
    rows[:-1] = [row + target_ids for row in rows[:-1]]
    longest = max(len(row) for row in rows)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    labels[:-1, -len(target_ids) :] = torch.tensor(target_ids)
    return EditBatch(
        input_ids.to(device), attention_mask.to(device), labels.to(device), len(target_ids)
    )
