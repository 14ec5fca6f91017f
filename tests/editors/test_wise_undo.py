"""A batch of WISE that fails leaves the side memory bit for bit as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from wise_worlds import EDITS, settings

from pyeditfast import WiseEditor
from pyeditfast.editors import wise_training, wise_undo
from pyeditfast.editors.wise_undo import BeforeSteps
from pyeditfast.ops import random_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def edited(dtype, family="llama"):
    """Return an editor with two edits in a shard."""
    wise = WiseEditor(tiny_model(family, dtype=dtype, layers=4), tiny_tokenizer(), settings())
    assert wise.edit(EDITS[:2]).edits == 2
    return wise


def failing_at(number, failure, monkeypatch):
    """Let ``failure`` have the losses of pass ``number`` of the next edit."""
    original, passes = wise_training.SuffixReplay.answer_losses, iter(range(1000))

    def losses(self, output):
        told = original(self, output)
        return failure(told) if next(passes) == number else told

    monkeypatch.setattr(wise_training.SuffixReplay, "answer_losses", losses)


def no_memory(losses):
    raise torch.OutOfMemoryError("CUDA out of memory")


def error(losses):
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (lambda losses: losses * torch.nan, "not finite after 5 steps; the edit was undone"),
        (no_memory, "out of memory"),
    ],
)
def test_a_rejected_edit_is_undone(failure, reason, dtype, family, monkeypatch):
    wise = edited(dtype, family)
    memory = wise.memories.current
    weight, threshold = memory.weight.clone(), memory.threshold
    with monkeypatch.context() as broken:
        failing_at(5, failure, broken)
        report = wise.edit(EDITS[2:3])
    assert (report.edits, len(report.rejected)) == (0, 1)
    assert reason in report.rejected[0].reason
    assert torch.equal(memory.weight, weight)
    assert (memory.threshold, len(memory.edits)) == (threshold, 2)
    assert wise.edit(EDITS[2:3]).edits == 1
    assert not torch.equal(memory.weight, weight)


def test_an_error_in_an_edit_is_undone(monkeypatch):
    wise = edited(torch.float32)
    weight = wise.memories.current.weight.clone()
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="in the middle"):
        failing_at(5, error, broken)
        wise.edit(EDITS[2:3])
    assert torch.equal(wise.memories.current.weight, weight)


def test_a_last_step_that_leaves_no_finite_memory_is_undone(monkeypatch):
    wise = edited(torch.float32)
    weight = wise.memories.current.weight.clone()
    step, steps = wise_training.masked_sgd_product_, iter(range(12))

    def spoiling(side, *arguments, **options):
        step(side, *arguments, **options)
        if next(steps) == 11:
            side[0, 0] = torch.inf

    with monkeypatch.context() as broken:
        broken.setattr(wise_training, "masked_sgd_product_", spoiling)
        broken.setattr(wise_training, "SMALL_LOSS", -1.0)
        report = wise.edit(EDITS[2:3])
    assert "not finite after 12 steps" in report.rejected[0].reason
    assert torch.equal(wise.memories.current.weight, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_of_a_16_bit_memory_only_what_the_mask_selects_is_kept(dtype, transposed, monkeypatch):
    monkeypatch.setattr(wise_undo, "BLOCK_ELEMENTS", 100)
    side = torch.randn(7, 33).to(dtype)
    side = side.T.contiguous().T if transposed else side
    before = side.clone()
    undo = BeforeSteps(side, settings(mask_ratio=0.2), seed=3)
    selected = random_mask(3, 0.2, side.shape)
    whole = dtype == torch.float32
    kept = sum(part.numel() for part in undo._kept)
    assert kept == (side.numel() if whole else int(selected.sum()))
    side[selected] = torch.nan
    undo.restore()
    assert torch.equal(side, before)


def test_a_decay_that_16_bits_can_tell_is_undone_too():
    side = torch.randn(6, 10).to(torch.float16)
    undo = BeforeSteps(side, settings(edit_lr=100.0), seed=0)
    assert sum(part.numel() for part in undo._kept) == side.numel()
