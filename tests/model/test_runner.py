"""Passes shrink when memory runs out, and errors keep their names."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from pyeditfast.errors import PassTooLargeError
from pyeditfast.model.memory import available_memory, default_tokens_per_pass, is_out_of_memory
from pyeditfast.model.passes import longest_first
from pyeditfast.model.query_batch import Query, query_batch
from pyeditfast.model.runner import ModelRunner, seen_by_answers
from pyeditfast.model.sequences import AnswerSequence


def items(lengths):
    return longest_first([AnswerSequence(i, tuple(range(n)), (1,)) for i, n in enumerate(lengths)])


def limited(limit, calls):
    def run(current):
        tokens = sum(len(item) for item in current)
        calls.append(tokens)
        if tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return [item.index for item in current]

    return run


@pytest.mark.parametrize("limit", [10, 13, 25, 40])
def test_passes_are_halved_until_they_fit(limit):
    runner = ModelRunner(tiny_model("llama"), tokens_per_pass=1000)
    calls = []
    waiting = items([10, 9, 8, 8, 7, 3, 3, 2])
    results = runner.run_in_passes(waiting, limited(limit, calls))
    assert [i for _, result in results for i in result] == [item.index for item in waiting]
    assert runner.tokens_per_pass < 1000
    # Later work starts small: no pass of the second run is refused.
    calls.clear()
    runner.run_in_passes(waiting, limited(limit, calls))
    assert max(calls) <= max(limit, 10)


def test_one_sequence_that_does_not_fit_is_named():
    runner = ModelRunner(tiny_model("llama"), tokens_per_pass=1000)
    with pytest.raises(PassTooLargeError, match="one sequence of 30 tokens does not fit"):
        runner.run_in_passes(items([30, 4]), limited(20, []))
    assert runner.tokens_per_pass == 1000


def test_other_errors_pass_through():
    runner = ModelRunner(tiny_model("llama"), tokens_per_pass=1000)

    def run(current):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        runner.run_in_passes(items([3]), run)
    assert runner.tokens_per_pass == 1000


def test_cpu_allocation_failures_are_recognised():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(failure.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_defaults_are_within_bounds():
    model = tiny_model("llama")
    assert available_memory(torch.device("cpu")) > 1 << 20
    assert 64 <= default_tokens_per_pass(model, [torch.device("cpu")], 3) <= 16384
    with pytest.raises(ValueError, match="tokens_per_pass is 0"):
        ModelRunner(model, tokens_per_pass=0)


@pytest.mark.parametrize(
    ("layout", "slots", "positions"),
    [
        ("packed", [0, 1, 2, 6, 7], [0, 1, 2, 0, 1]),
        ("right", [0, 1, 2, 8, 9], [0, 1, 2, 0, 1]),
        # Left pads shift positions.
        ("left", [0, 1, 2, 9, 10], [0, 1, 2, 1, 2]),
    ],
)
def test_what_the_answers_of_a_pass_see(layout, slots, positions):
    queries = [Query((5, 6, 7, 8), (7, 8)), Query((4, 3)), Query((9, 2, 1), (1,))]
    batch = query_batch(queries, layout).batch
    found, seen = seen_by_answers(batch)
    assert seen.tolist() == slots
    assert found.inputs["input_ids"].tolist() == [[5, 6, 7, 9, 2]]
    assert found.inputs["position_ids"].tolist() == [positions]
    assert found.inputs["packed_layout"].lengths == [3, 2]
    # Tokens 6, 7 and 2 come before the targets.
    assert found.answer_slots.tolist() == [1, 2, 4]
    assert found.targets.tolist() == [7, 8, 1]
