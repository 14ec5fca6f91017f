"""Gathering a stream of edits into turns of usable token sequences."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from pyeditfast.data.edit import Edit
from pyeditfast.editors.report import Rejection
from pyeditfast.model.sequences import AnswerSequence, build_sequences


@dataclass
class Turn:
    """The edits of one turn.

    ``sequences`` carry the number of the edit in the run as ``index``; ``edits`` maps that number
    to the edit; ``consumed`` counts the records read since the turn before, usable or not;
    ``by_prompt`` lists the edits of each prompt, which share one target.
    """

    sequences: list[AnswerSequence] = field(default_factory=list)
    edits: dict[int, Edit] = field(default_factory=dict)
    rejected: list[Rejection] = field(default_factory=list)
    consumed: int = 0
    by_prompt: dict[str, list[int]] = field(default_factory=dict)

    def reject(self, index: int, reason: str) -> None:
        """Take edit ``index`` out of the turn and note why."""
        edit = self.edits.pop(index)
        self.sequences = [sequence for sequence in self.sequences if sequence.index != index]
        self.rejected.append(Rejection(index, edit.prompt, edit.target, reason))


def gather_turns(
    edits: Iterable[Edit],
    tokenizer: PreTrainedTokenizerBase,
    turn_size: int,
    limit: int | None,
    vocabulary: int | None = None,
) -> Iterator[Turn]:
    """Yield turns of ``turn_size`` usable edits; the last may be smaller, and empty if only
    rejected edits were left.

    Rejected: an empty or untokenizable prompt or target, a sequence longer than ``limit`` tokens,
    and an edit whose prompt comes again in the same turn with another target (the last one wins).
    Reads no more of ``edits`` than a turn needs. Raises ``TypeError`` for something that is not an
    ``Edit``.
    """
    stream = enumerate(edits)
    while True:
        turn = Turn()
        while len(turn.edits) < turn_size:
            block = list(itertools.islice(stream, turn_size - len(turn.edits)))
            if not block:
                break
            _add(turn, block, tokenizer, limit, vocabulary)
        if turn.consumed == 0:
            return
        yield turn


def _add(
    turn: Turn,
    block: list[tuple[int, Edit]],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    vocabulary: int | None,
) -> None:
    for index, edit in block:
        if not isinstance(edit, Edit):
            raise TypeError(f"edit {index} is a {type(edit).__name__}, not a pyeditfast.Edit")
    pairs = [(edit.prompt, edit.target) for _, edit in block]
    built = build_sequences(tokenizer, pairs, limit, vocabulary)
    turn.consumed += len(block)
    for (index, edit), sequence in zip(block, built, strict=True):
        turn.edits[index] = edit
        if isinstance(sequence, str):
            turn.reject(index, sequence)
            continue
        same = turn.by_prompt.setdefault(edit.prompt, [])
        if same and turn.edits[same[0]].target != edit.target:
            for other in same:
                turn.reject(
                    other, f"edit {index} gives the same prompt another target; the last wins"
                )
            same.clear()
        same.append(index)
        turn.sequences.append(dataclasses.replace(sequence, index=index))
