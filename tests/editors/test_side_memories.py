"""Shards, merges and the order of side memories."""

from __future__ import annotations

import pytest
import torch
from wise_worlds import EDITS, editor

from pyeditfast.editors import side_memories
from pyeditfast.editors.side_memories import SideMemories, WrittenEdit
from pyeditfast.editors.wise_config import WiseConfig
from pyeditfast.ops import merge, random_mask

MAIN = torch.arange(12.0).reshape(3, 4)


def write(memories, gap):
    memory = memories.trainable()
    memory.weight += gap
    memory.note(gap, WrittenEdit(EDITS[0], "x"), memories.config.act_ratio)
    memories.close_shard_if_full()


def filled(gaps, **changes):
    config = WiseConfig(**{"save_freq": 2, "merge_freq": 4, "merge_alg": "linear", **changes})
    memories = SideMemories(MAIN.clone(), config)
    for gap in gaps:
        write(memories, gap)
    return memories


def test_nothing_exists_before_the_first_edit():
    memories = filled([])
    assert memories.all() == []
    assert memories.trainable().weight.data_ptr() != memories.main.data_ptr()
    # A memory without edits answers nothing.
    assert memories.all() == []


def test_a_shard_is_closed_after_save_freq_edits_and_the_next_begins_from_the_main_memory():
    memories = filled([3.0, 1.0, 2.0])
    assert [len(memory.edits) for memory in memories.all()] == [2, 1]
    assert torch.equal(memories.shards[0].weight, MAIN + 4)
    assert torch.equal(memories.current.weight, MAIN + 2)


def test_every_shard_has_another_mask():
    memories = filled([1.0], seed=7)
    assert memories.mask_seed == 7
    write(memories, 1.0)
    write(memories, 1.0)
    assert memories.mask_seed == 8


def test_the_threshold_is_the_smallest_gap_of_the_memory_times_the_ratio():
    memories = filled([3.0, 1.0, 2.0], act_ratio=0.5)
    assert [memory.threshold for memory in memories.all()] == [0.5, 1.0]


def test_shards_are_merged_after_merge_freq_edits():
    memories = filled([1.0, 2.0, 4.0, 8.0])
    assert len(memories.all()) == 1
    merged = memories.merged[0]
    assert torch.equal(merged.weight, merge(MAIN, [MAIN + 3, MAIN + 12], "linear"))
    assert merged.smallest_gap == 1.0 and len(merged.edits) == 4


def test_retrieve_keeps_one_memory_a_merge():
    memories = filled([1.0] * 9)
    assert [len(memory.edits) for memory in memories.all()] == [4, 4, 1]


def test_without_retrieve_there_is_one_merged_memory():
    memories = filled([1.0] * 9, retrieve=False)
    assert [len(memory.edits) for memory in memories.all()] == [8, 1]
    # Two shards of weight 0.2 each beside the earlier merge's 0.6.
    expected = MAIN + 0.2 * 2 + 0.2 * 2 + 0.6 * 2
    torch.testing.assert_close(memories.merged[0].weight, expected)


@pytest.mark.parametrize("retrieve", [True, False])
def test_the_editor_hands_its_memories_to_the_router(retrieve):
    wise = editor(save_freq=1, merge_freq=2, retrieve=retrieve, n_iter=3)
    counts = []
    for edit in EDITS[:5]:
        wise.edit([edit])
        counts.append(len(wise.layer.side_weights))
    assert counts == ([1, 1, 2, 2, 3] if retrieve else [1, 1, 2, 1, 2])
    assert len(wise.layer.thresholds) == counts[-1]


def failing(*args, **options):
    raise RuntimeError("no room to merge")


@pytest.mark.parametrize("retrieve", [True, False])
def test_a_merge_that_fails_loses_nothing_and_is_tried_again(retrieve, monkeypatch):
    memories = filled([1.0] * 4, retrieve=retrieve)
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="no room"):
        broken.setattr(side_memories, "merge", failing)
        for _ in range(4):
            write(memories, 1.0)
    assert [len(memory.edits) for memory in memories.all()] == [4, 2, 2]
    write(memories, 1.0)
    write(memories, 1.0)
    assert [len(memory.edits) for memory in memories.all()] == ([4, 6] if retrieve else [10])


def test_a_merge_that_fails_leaves_an_editor_that_can_be_used(monkeypatch, tmp_path):
    wise = editor(save_freq=1, merge_freq=2, n_iter=3)
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="no room"):
        broken.setattr(side_memories, "merge", failing)
        wise.edit(EDITS[:3])
    assert (wise.edits, wise.records) == (2, 2)
    assert len(wise.layer.side_weights) == 2
    wise.save(tmp_path)
    assert wise.edit(EDITS[2:3]).edits == 1
    assert [len(memory.edits) for memory in wise.memories.all()] == [3]


def test_a_memory_without_edits_is_dropped_and_its_mask_used_again():
    memories = filled([1.0, 1.0], seed=7)
    memories.trainable()
    assert memories.mask_seed == 8
    memories.end_batch()
    assert memories.current is None
    memories.trainable()
    assert memories.mask_seed == 8
    write(memories, 1.0)
    memories.end_batch()
    assert len(memories.current.edits) == 1


@pytest.mark.parametrize("algorithm", ["dare_linear", "dare_ties"])
def test_a_merge_draws_other_elements_than_its_shards_trained(algorithm):
    config = WiseConfig(
        save_freq=1, merge_freq=2, merge_alg=algorithm, density=0.5, mask_ratio=0.4, seed=7
    )
    memories = SideMemories(torch.zeros(100, 100), config)
    drawn = []
    for _ in range(4):
        memory = memories.trainable()
        trained = random_mask(memories.mask_seed, 0.4, memory.weight.shape)
        memory.weight[trained] = 1.0
        drawn.append(trained)
        memory.note(1.0, WrittenEdit(EDITS[0], "x"), 0.9)
        memories.end_batch()
        memories.close_shard_if_full()
    assert len(memories.merged) == 2
    for number, merged in enumerate(memories.merged):
        first, second = drawn[2 * number : 2 * number + 2]
        # Where one shard alone trained an element it is kept half of the time.
        for alone in (first & ~second, second & ~first):
            kept = (merged.weight[alone] != 0).double().mean()
            assert 0.45 < float(kept) < 0.55
