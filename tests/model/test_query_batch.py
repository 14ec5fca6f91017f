"""Whole queries as model inputs: packed, padded on the right, padded on the left."""

from __future__ import annotations

import pytest
import torch

from pyeditfast.model.query_batch import LAYOUTS, Query, query_batch

QUERIES = [Query((3, 4, 5, 6), (5, 6)), Query((7, 8)), Query((9, 10, 11), (11,))]


def test_a_target_token_follows_each_answer_position():
    assert list(QUERIES[0].answer_positions) == [1, 2]
    assert list(QUERIES[1].answer_positions) == []
    assert list(QUERIES[2].answer_positions) == [1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_slots_find_their_tokens(layout):
    found = query_batch(QUERIES, layout, pad_token=1)
    flat = found.batch.inputs["input_ids"].flatten()
    for number, query in enumerate(QUERIES):
        assert flat[found.rows[number]][found.mask[number]].tolist() == list(query.tokens)
    # The token that an answer position reads is the one before its target.
    assert flat[found.batch.answer_slots].tolist() == [4, 5, 10]
    assert found.batch.targets.tolist() == [5, 6, 11]
    assert found.answers == [2, 0, 1]


def test_padding_goes_to_its_side():
    left = query_batch(QUERIES, "left", pad_token=1).batch.inputs
    right = query_batch(QUERIES, "right", pad_token=1).batch.inputs
    assert left["input_ids"][1].tolist() == [1, 1, 7, 8]
    assert right["input_ids"][1].tolist() == [7, 8, 1, 1]
    assert left["attention_mask"][1].tolist() == [0, 0, 1, 1]
    assert right["attention_mask"][1].tolist() == [1, 1, 0, 0]


def test_left_padding_to_a_given_width():
    found = query_batch(QUERIES, "left", pad_token=1, longest=6)
    assert found.batch.inputs["input_ids"].shape == (3, 6)
    assert found.rows.shape == (3, 6)


def test_packed_has_no_pads_and_its_own_positions():
    inputs = query_batch(QUERIES, "packed").batch.inputs
    assert inputs["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]


def test_refuses_an_unknown_layout():
    with pytest.raises(ValueError, match="layout is 'middle'; choose one of packed, right, left"):
        query_batch(QUERIES, "middle")


def test_moves_to_a_device():
    found = query_batch(QUERIES, "right").to(torch.device("meta"))
    assert {tensor.device.type for tensor in (found.rows, found.mask)} == {"meta"}
    assert found.batch.inputs["input_ids"].device.type == "meta"
