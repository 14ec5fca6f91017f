"""The WISE baseline against the reference functions, one unpadded sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_models import BOS_ID, PAD_ID, mlp_modules, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pyeditfast.reference import random_mask
from pyeditfast.reference.activation_gap import activation_gap
from pyeditfast.reference.margin_loss import margin_loss
from pyeditfast.reference.masked_sgd import masked_sgd_
from pyeditfast.reference.ties_merge import ties_merge
from pyeditfast_published import PublishedWise
from pyeditfast_published.edit_batch import edit_batch

TEMPLATES = ("{}", "The engineer said: {}", "Near the small town, in the old kingdom, {}")
EDIT = ("The capital of the old kingdom is", "the harbour city", "Where was the painter born?")
OTHERS = (
    ("The singer plays", "the piano", "The architect was born in"),
    ("The mother tongue of the painter is", "Latin", "The bank"),
    ("Where was the engineer born?", "London", "The official religion of the court is"),
)
MARGINS = (0.05, 6.0, 3.0)
NO_MARGINS = (1e9, 0.0, -1e9)
RATIO = 0.3
DECAY = 1e-5
ACTIVATIONS = {"llama": "silu", "gpt2": "gelu_tanh", "gptj": "gelu_tanh", "qwen2": "silu"}


def matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight as ``[d_out, d_in]``."""
    return weight.T if isinstance(module, Conv1D) else weight


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@contextmanager
def using(module: nn.Module, side: Tensor, inputs: list[Tensor]) -> Iterator[None]:
    """Let ``side`` ``[d_out, d_in]`` answer in place of the module's weight; note its inputs."""

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        inputs.append(args[0])
        return nn.functional.linear(args[0], side, module.bias)

    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


class ByHand:
    """WISE from its formulas on a model of its own; ``pads`` reproduces the two quirks."""

    def __init__(self, model: PreTrainedModel, family: str, pads: bool) -> None:
        self.model, self.pads, self.family = model.requires_grad_(False), pads, family
        self.module = model.get_submodule(mlp_modules(model, family)[-1])
        self.tokenizer = tiny_tokenizer(bos=True)
        self.main = matrix(self.module, self.module.weight).detach().clone()
        self.side = self.main.clone()

    def gaps(self, x: Tensor, side: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.family]
        return activation_gap(
            x, self.main, [side], bias=self.module.bias, activation=activation, reduction="mean"
        )[:, 0]

    def forward(self, edit: Sequence[str], side: Tensor) -> tuple[Tensor, Tensor]:
        """The target losses ``[templates]`` and the gaps ``[templates + 1]``."""
        prompt, target, locality = edit
        target_ids = self.tokenizer(" " + target, add_special_tokens=False).input_ids
        rows = [self.tokenizer(t.format(prompt)).input_ids + target_ids for t in TEMPLATES]
        rows.append(self.tokenizer(locality).input_ids)
        longest = max(map(len, rows)) if self.pads else 0
        losses, gaps = [], []
        for row in rows:
            ids = [PAD_ID] * (longest - len(row)) + row
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row)])
            inputs: list[Tensor] = []
            with using(self.module, side, inputs):
                logits = self.model(torch.tensor([ids]), attention_mask=mask).logits[0]
            gaps.append(self.gaps(inputs[0], side)[0])
            chosen = logits[-len(target_ids) - 1 : -1].log_softmax(-1)
            chosen = chosen[range(len(target_ids)), target_ids]
            losses.append(-chosen.sum() / (len(target_ids) + self.pads))
        return torch.stack(losses[:-1]), torch.stack(gaps)

    def step(self, edit: Sequence[str], lr: float, seed: int, bound: float) -> tuple[float, float]:
        """Take a step; return the loss and the mean in-scope gap before it."""
        side = self.side.clone().requires_grad_()
        losses, gaps = self.forward(edit, side)
        loss = losses.mean() + margin_loss(gaps[:-1], gaps[-1], MARGINS)
        (grad,) = torch.autograd.grad(loss, side)
        masked_sgd_(
            self.side,
            grad,
            self.main,
            seed=seed,
            ratio=RATIO,
            lr=lr,
            weight_decay=DECAY,
            norm_constraint=bound,
        )
        return loss.item(), gaps[:-1].mean().item()


def baseline(
    family: str = "llama", dtype: torch.dtype = torch.float64, width: int = 32, **arguments: object
) -> PublishedWise:
    model = tiny_model(family, dtype, hidden_size=width, intermediate_size=2 * width)
    arguments = {"templates": TEMPLATES, "act_margin": MARGINS, **arguments}
    name = mlp_modules(model, family)[-1]
    return PublishedWise(model, tiny_tokenizer(bos=True), name, **arguments)  # type: ignore[arg-type]


def shape_of(editor: PublishedWise) -> tuple[int, int]:
    rows, columns = matrix(editor.layer.layer, editor.side_weight).shape
    return rows, columns


@pytest.mark.parametrize("quirks", ["none", "published"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_steps_are_those_of_the_reference(family: str, quirks: str) -> None:
    # GPT-J's attention is float32 whatever the model's dtype, and pads change its rounding.
    tolerance = 1e-4 if family == "gptj" else 1e-9
    hand = ByHand(tiny_model(family, torch.float64), family, pads=quirks == "published")
    expected = [hand.step(EDIT, lr=0.1, seed=4, bound=0.02) for _ in range(5)]
    mask = random_mask(4, RATIO, hand.main.shape)
    editor = baseline(family, n_iter=5, edit_lr=0.1, norm_constraint=0.02, quirks=quirks, mask=mask)
    assert editor.edit(*EDIT) == 5
    assert editor.losses == pytest.approx([loss for loss, _ in expected], rel=tolerance)
    assert editor.recorded_gaps == pytest.approx([expected[-1][1]], rel=tolerance)
    change = matrix(editor.layer.layer, editor.side_weight) - hand.main
    assert relative_error(change, hand.side - hand.main) < tolerance
    # The margins and the clamp both took part.
    assert expected[-1][1] > 0.1 and (change.abs() > 0.0199).sum() > 10


def test_a_batch_is_left_padded_with_the_target_whole_and_the_locality_prompt_last() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    target = tokenizer(" the harbour city", add_special_tokens=False).input_ids
    assert len(target) > 1
    batch = edit_batch(tokenizer, TEMPLATES, *EDIT)
    longest = batch.input_ids.shape[1]
    assert batch.targets == len(target) and batch.input_ids.shape[0] == len(TEMPLATES) + 1
    texts = [template.format(EDIT[0]) for template in TEMPLATES]
    rows = [tokenizer(text).input_ids + target for text in texts]
    rows.append(tokenizer(EDIT[2]).input_ids)
    assert longest == max(map(len, rows)) and len({len(row) for row in rows}) == 4
    for number, row in enumerate(rows):
        assert row[0] == BOS_ID
        pads = longest - len(row)
        assert batch.input_ids[number].tolist() == [PAD_ID] * pads + row
        assert batch.attention_mask[number].tolist() == [0] * pads + [1] * len(row)
        labelled = target if number < len(TEMPLATES) else []
        assert batch.labels[number].tolist() == [-100] * (longest - len(labelled)) + labelled


@pytest.mark.parametrize("quirks", ["none", "published"])
def test_only_the_published_gaps_depend_on_a_row_s_neighbours(quirks: str) -> None:
    gaps = []
    for locality in ("The bank", "The bank " + "of the court of the old kingdom " * 3):
        # gpt2 has absolute positions, which pads must not shift either.
        editor = baseline("gpt2", n_iter=6, edit_lr=0.1, quirks=quirks, act_margin=(1e9, 6.0, -1e9))
        editor.edit(EDIT[0], EDIT[1], locality)
        gaps.append(editor.recorded_gaps[0])
    difference = abs(gaps[0] - gaps[1]) / gaps[0]
    assert difference < 1e-9 if quirks == "none" else difference > 1e-3


def test_the_published_loss_is_divided_by_one_token_more() -> None:
    losses = {}
    for quirks in ("none", "published"):
        for target in ("French", "the harbour city"):
            editor = baseline(n_iter=1, quirks=quirks, act_margin=NO_MARGINS)
            editor.edit(EDIT[0], target, EDIT[2])
            losses[quirks, target] = editor.losses[0]
    tokenizer = tiny_tokenizer(bos=True)
    for target in ("French", "the harbour city"):
        count = len(tokenizer(" " + target, add_special_tokens=False).input_ids)
        expected = losses["none", target] * count / (count + 1)
        assert losses["published", target] == pytest.approx(expected, rel=1e-6)


def test_an_edit_stops_when_two_losses_agree_and_is_recorded_before_a_step() -> None:
    def edited(n_iter: int) -> PublishedWise:
        # Wide enough for the loss to come below 0.02.
        editor = baseline(
            "gpt2", width=64, n_iter=n_iter, mask_ratio=1.0, act_margin=NO_MARGINS, quirks="none"
        )
        assert editor.edit(*EDIT) == len(editor.losses)
        return editor

    hand = ByHand(
        tiny_model("gpt2", torch.float64, hidden_size=64, intermediate_size=128), "gpt2", pads=False
    )

    def gap(editor: PublishedWise) -> float:
        return hand.forward(EDIT, editor.side_weight.T.detach())[1][:-1].mean().item()

    editor = edited(400)
    losses = editor.losses
    steps = len(losses)
    agree = [
        i
        for i in range(2, steps + 1)
        if abs(losses[i - 1] - losses[i - 2]) <= 1e-4 and losses[i - 1] <= 0.02
    ]
    assert 3 < steps < 400 and agree == [steps]
    # Being low is not enough.
    assert losses[steps - 3] <= 0.02
    # Stopped: no step was taken after the recorded forward pass.
    assert editor.recorded_gaps == pytest.approx([gap(editor)], rel=1e-9)
    # Not stopped: the same steps, the last of them after the recorded forward pass.
    whole, shorter = edited(steps), edited(steps - 1)
    assert torch.equal(whole.side_weight, editor.side_weight)
    assert whole.recorded_gaps == pytest.approx([gap(shorter)], rel=1e-9)
    assert whole.recorded_gaps != pytest.approx(editor.recorded_gaps, rel=1e-7)


@pytest.mark.parametrize(("reached", "steps"), [(0.03, 6), (0.02, 2)])
def test_losses_that_agree_stop_an_edit_only_where_they_are_low(reached: float, steps: int) -> None:
    editor = baseline("gpt2", width=64, mask_ratio=1.0, act_margin=NO_MARGINS, n_iter=1)
    editor.edit(*EDIT)
    while editor.losses[-1] > reached:
        editor.edit(*EDIT)
    editor.n_iter, editor.edit_lr = 6, 1e-9
    assert editor.edit(*EDIT) == steps
    assert max(editor.losses) - min(editor.losses) < 1e-6
    assert (editor.losses[-1] <= 0.02) == (steps == 2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_are_drawn_by_numpy_for_every_shard_and_reach_the_gradient_only(family: str) -> None:
    editor = baseline(family, n_iter=2, mask_ratio=0.2, save_freq=2, merge_freq=4, seed=11)
    generator = np.random.RandomState(11)
    size = editor.side_weight.numel()
    drawn = [generator.choice([1, 0], size=size, p=[0.2, 0.8]) for _ in range(2)]
    main = editor.layer.main_weight.detach()
    state = np.random.get_state()[1].copy()
    for number in range(3):
        editor.edit(*[EDIT, *OTHERS][number])
        assert editor.weight_mask is not None and editor.weight_mask.dtype == torch.int64
        assert editor.weight_mask.tolist() == drawn[number // 2].tolist()
        shard = editor.memories[0] if number == 1 else editor.side_weight
        kept = editor.weight_mask.view_as(main) == 0
        steps = 2 * (number % 2 + 1)
        decayed = main[kept] * (1 - DECAY) ** steps
        torch.testing.assert_close(shard[kept], decayed, rtol=1e-12, atol=0.0)
        assert (shard - main)[~kept].abs().median() > 1e-3
    assert (np.random.get_state()[1] == state).all()


def test_shards_are_merged_into_memories_with_the_smallest_gap_of_theirs() -> None:
    numbers = []

    def mask(shard: int) -> Tensor:
        numbers.append(shard)
        return random_mask(shard, RATIO, shape)

    editor = baseline(n_iter=4, save_freq=1, merge_freq=2, mask=mask, act_ratio=0.5)
    shape = shape_of(editor)
    main = editor.layer.main_weight.detach()
    alone = []
    for number, edit in enumerate((EDIT, *OTHERS)):
        single = baseline(n_iter=4, mask=random_mask(number, RATIO, shape), act_ratio=0.5)
        single.edit(*edit)
        alone.append(single)
        assert editor.edit(*edit) == 4
        assert len(editor.memories) == (1, 1, 2, 2)[number]
        assert torch.equal(editor.side_weight, main) and not editor.side_weight.requires_grad
        if number in (0, 2):
            assert torch.equal(editor.memories[-1], single.side_weight)
    gaps = [single.recorded_gaps[0] for single in alone]
    assert numbers == [0, 1, 2, 3] and editor.recorded_gaps == gaps
    assert editor.memory_thresholds == [0.5 * min(gaps[:2]), 0.5 * min(gaps[2:])]
    assert editor.threshold > 1e8 and alone[0].threshold == 0.5 * gaps[0]
    for memory, pair in zip(editor.memories, (alone[:2], alone[2:]), strict=True):
        sides = [single.side_weight.detach() for single in pair]
        torch.testing.assert_close(memory, ties_merge(main, sides, 0.53), rtol=0, atol=1e-15)
        assert not torch.equal(memory, main)


def test_without_retrieval_one_memory_takes_every_merge() -> None:
    edits = (EDIT, *OTHERS)
    editor = baseline(n_iter=3, save_freq=1, merge_freq=2, retrieve=False)
    shape = shape_of(editor)
    editor.mask = lambda shard: random_mask(shard, RATIO, shape)
    main = editor.layer.main_weight.detach().clone()
    sides = []
    for number, edit in enumerate(edits):
        single = baseline(n_iter=3, mask=random_mask(number, RATIO, shape))
        single.edit(*edit)
        sides.append(single.side_weight.detach())
        editor.edit(*edit)
        assert torch.equal(editor.merged_weight, main) == (number == 0)
    first = ties_merge(main, sides[:2], 0.53)
    both = ties_merge(main, [*sides[2:], first], 0.53, [0.2, 0.2, 0.6])
    assert relative_error(editor.merged_weight.detach() - main, both - main) < 1e-6
    assert editor.memories == []
    editor.remove()
    assert torch.equal(editor.model.get_submodule(editor.edit_module).weight, main)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_side_weight_changes(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    name = mlp_modules(model, family)[-1]
    module = model.get_submodule(name)
    next(iter(model.parameters())).requires_grad_(False)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: value.requires_grad for key, value in model.named_parameters()}
    tokenizer = tiny_tokenizer(bos=True)
    editor = PublishedWise(model, tokenizer, name, templates=TEMPLATES, n_iter=3)
    editor.edit(*EDIT)
    change = editor.side_weight - module.weight
    assert editor.side_weight.dtype == dtype and 0 < change.abs().max() <= 1.01
    assert editor.side_weight.grad is None and model.training
    editor.remove()
    assert model.get_submodule(name) is module
    assert {key: value.requires_grad for key, value in model.named_parameters()} == flags
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(editor.spare_layer.weight, module.weight)


def test_an_edited_prompt_gets_its_target_through_the_router() -> None:
    editor = baseline(
        "gpt2", torch.float32, templates=["{}"], act_margin=(1.0, 4.0, 2.0), mask_ratio=1.0
    )
    ids = edit_batch(editor.tokenizer, ["{}"], *EDIT).input_ids[:1]
    target = editor.tokenizer(" " + EDIT[1], add_special_tokens=False).input_ids
    locality = torch.tensor([editor.tokenizer(EDIT[2]).input_ids])
    with torch.no_grad():
        before = editor.model(locality).logits
        editor.edit(*EDIT)
        answer = editor.model(ids).logits[0, -len(target) - 1 : -1].argmax(-1)
        assert answer.tolist() == target and editor.layer.route == 0
        assert torch.equal(editor.model(locality).logits, before) and editor.layer.route == -1


def test_bad_arguments_are_named() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    model = tiny_model("llama")
    name = mlp_modules(model, "llama")[-1]
    for message, arguments in {
        "every template needs": {"templates": ["Yes, "]},
        "every template needs a '{}', got []": {"templates": []},
        "merge_freq a multiple of save_freq, got n_iter 70, save_freq 3, merge_freq 4": {
            "save_freq": 3,
            "merge_freq": 4,
        },
        "n_iter 0": {"n_iter": 0},
        "must be shares, got 1.5 and 0.53": {"mask_ratio": 1.5},
        "must be shares, got 0.2 and 0": {"density": 0},
        "got 'slerp'": {"merge_alg": "slerp"},
        "got 'all'": {"quirks": "all"},
        "no activation is called 'sulu'": {"activation": "sulu"},
    }.items():
        with pytest.raises(ValueError) as error:
            PublishedWise(model, tokenizer, name, **arguments)  # type: ignore[arg-type]
        assert message in str(error.value)
    with pytest.raises(TypeError, match=r"'model\.norm' must be nn\.Linear"):
        PublishedWise(model, tokenizer, "model.norm")
    with pytest.raises(ValueError, match=r"no module 'model\.layer'"):
        PublishedWise(model, tokenizer, "model.layer")
    assert isinstance(model.get_submodule(name), nn.Linear)
    editor = PublishedWise(model, tokenizer, name, mask=np.ones((2, 3), dtype=bool))
    with pytest.raises(ValueError, match=r"\[d_out, d_in\] of a weight .*got torch\.bool \(2, 3\)"):
        editor.edit(*EDIT)
    with pytest.raises(ValueError, match="must not be the edit prompt, got 'The bank' twice"):
        editor.edit("The bank", "Latin", "The bank")
    with pytest.raises(ValueError, match=r"target ' ' .*each needs at least one"):
        editor.edit("The bank", " ", "The court")
