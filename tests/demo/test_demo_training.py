"""Training and keeping the demonstration's model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pyeditfast.demo import training as subject
from pyeditfast.demo.training import (
    TrainingSettings,
    cached_folder,
    train_model,
    train_tokenizer,
    trained_model,
    training_record,
)
from pyeditfast.demo.world import World, WorldSettings

WORLD = WorldSettings(people=4, places=4, companies=4, phrasings=2)
TINY = TrainingSettings(
    hidden=32, layers=2, heads=2, intermediate=64, vocabulary=500, passes=2, batch=16
)


def silent(line: str) -> None:
    """Take no notice."""


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_loss_falls_and_progress_is_told() -> None:
    statements = World(0, WORLD).statements()
    tokenizer = train_tokenizer(statements, 500)
    settings = TrainingSettings(
        hidden=64, layers=2, heads=2, intermediate=128, vocabulary=500, passes=12, batch=16, lr=3e-3
    )
    lines: list[str] = []
    model, losses = train_model(statements, tokenizer, settings, 0, lines.append)
    assert len(losses) == len(lines) == 12
    assert losses[-1] < 0.3 * losses[0]
    assert lines[-1] == f"  pass 12 of 12: loss {losses[-1]:.3f}, 0 s left"
    assert not model.training
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_state_alone() -> None:
    statements = World(0, WORLD).statements()
    tokenizer = train_tokenizer(statements, 500)
    state = torch.random.get_rng_state()
    one, _ = train_model(statements, tokenizer, TINY, 1, silent)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    two, _ = train_model(statements, tokenizer, TINY, 1, silent)
    other, _ = train_model(statements, tokenizer, TINY, 2, silent)
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(other))


def test_padding_does_not_change_the_loss() -> None:
    statements = World(0, WORLD).statements()
    tokenizer = train_tokenizer(statements, 500)
    model, _ = train_model(statements, tokenizer, TINY, 0, silent)
    rows = sorted(subject._tokenized(statements[:16], tokenizer), key=lambda row: len(row[0]))
    assert len(rows[0][0]) < len(rows[-1][0])

    def loss(chosen: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        with torch.no_grad():
            return subject._answer_loss(
                model,
                subject._padded([row[0] for row in chosen], 0),
                subject._padded([row[1] for row in chosen], subject.IGNORED_LABEL),
            )

    told = torch.tensor([sum(label != -100 for label in row[1]) for row in rows])
    alone = torch.stack([loss([row]) for row in rows])
    torch.testing.assert_close(loss(rows), (alone * told).sum() / told.sum())


def test_a_pass_holds_every_statement_once_and_no_label_on_padding() -> None:
    statements = World(0, WORLD).statements()
    rows = subject._tokenized(statements, train_tokenizer(statements, 500))
    draw = torch.Generator().manual_seed(0)
    passes = []
    for _ in range(2):
        seen = []
        for input_ids, labels in subject._batches(rows, 10, draw):
            assert input_ids.shape == labels.shape and len(labels) <= 10
            for tokens, told in zip(input_ids.tolist(), labels.tolist(), strict=True):
                last = max(i for i, label in enumerate(told) if label != subject.IGNORED_LABEL)
                seen.append((tokens[: last + 1], told[: last + 1]))
        assert sorted(seen) == sorted(rows)
        passes.append(seen)
    assert passes[0] != passes[1]


def test_the_tokenizer_gives_names_few_tokens_and_text_back() -> None:
    world = World(0)
    statements = world.statements()
    tokenizer = train_tokenizer(statements, TrainingSettings().vocabulary)
    assert len(tokenizer) <= TrainingSettings().vocabulary
    sentences = [f"{statement.prompt} {statement.target}." for statement in statements]
    assert tokenizer.batch_decode(tokenizer(sentences)["input_ids"]) == sentences
    names = [" " + name for group in world.subjects.values() for name in group]
    assert max(len(ids) for ids in tokenizer(names)["input_ids"]) <= 5
    again = train_tokenizer(statements, TrainingSettings().vocabulary)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_model_in_the_cache_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(0, WORLD)
    first, tokenizer = trained_model(tmp_path, 0, world=world, training=TINY, print_line=silent)

    def no_training(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(subject, "train_model", no_training)
    lines: list[str] = []
    second, again = trained_model(tmp_path, 0, world=world, training=TINY, print_line=lines.append)
    assert same(weights(first), weights(second))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert not second.training
    folder = cached_folder(tmp_path, 0, world, TINY)
    assert list(tmp_path.iterdir()) == [folder]
    assert len(lines) == 1 and str(folder) in lines[0]
    record = training_record(folder)
    assert record["statements"] == len(world.statements())
    assert record["parameters"] == sum(p.numel() for p in first.parameters())


def test_everything_that_makes_the_model_names_its_folder(tmp_path: Path) -> None:
    world = World(0, WORLD)
    folders = {
        cached_folder(tmp_path, 0, world, TINY),
        cached_folder(tmp_path, 1, world, TINY),
        cached_folder(tmp_path, 0, World(1, WORLD), TINY),
        cached_folder(tmp_path, 0, World(0), TINY),
        cached_folder(tmp_path, 0, world, TrainingSettings()),
    }
    assert len(folders) == 5


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if "pass 1" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_model(tmp_path, 0, world=World(0, WORLD), training=TINY, print_line=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, folder: Path) -> None:
        assert any(Path(folder).iterdir()), "the model is written first"
        raise OSError("no space left")

    monkeypatch.setattr(subject.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        trained_model(tmp_path, 0, world=World(0, WORLD), training=TINY, print_line=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_another_process_finished_first_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(0, WORLD)
    first, _ = trained_model(tmp_path, 0, world=world, training=TINY, print_line=silent)
    folder = cached_folder(tmp_path, 0, world, TINY)
    subject._train_into(folder, 0, world, TINY, silent)
    second, _ = trained_model(tmp_path, 0, world=world, training=TINY, print_line=silent)
    assert same(weights(first), weights(second))
    assert list(tmp_path.iterdir()) == [folder]


def test_settings_that_make_no_model_are_refused() -> None:
    with pytest.raises(ValueError, match="passes is 0"):
        TrainingSettings(passes=0)
    with pytest.raises(ValueError, match=r"hidden 100 .* 8 heads"):
        TrainingSettings(hidden=100, heads=8)
    with pytest.raises(ValueError, match="vocabulary is 100"):
        TrainingSettings(vocabulary=100)
