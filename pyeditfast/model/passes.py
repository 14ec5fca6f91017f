"""Cutting many sequences into passes that fit in memory."""

from __future__ import annotations

from collections.abc import Sequence

from pyeditfast.model.sequences import AnswerSequence

LARGEST_PADDING = 2.0
"""Attention slots a real token at most: one long prompt must not inflate the attention of many
short ones.
"""


def longest_first(sequences: Sequence[AnswerSequence]) -> list[AnswerSequence]:
    """Return the sequences by falling length; equal lengths keep their order, as published."""
    return sorted(sequences, key=len, reverse=True)


def cut_passes(
    sequences: Sequence[AnswerSequence], tokens_per_pass: int
) -> list[list[AnswerSequence]]:
    """Cut sequences, longest first, into passes of at most ``tokens_per_pass`` tokens.

    A pass always holds at least one sequence. It ends early where padding its sequences to the
    longest would more than double their tokens.
    """
    passes: list[list[AnswerSequence]] = []
    tokens = 0
    for sequence in sequences:
        if passes:
            current = passes[-1]
            grown = tokens + len(sequence)
            padded = len(current[0]) * (len(current) + 1)
            if grown <= tokens_per_pass and padded <= LARGEST_PADDING * grown:
                current.append(sequence)
                tokens = grown
                continue
        passes.append([sequence])
        tokens = len(sequence)
    return passes
