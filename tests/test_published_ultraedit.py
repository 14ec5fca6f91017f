"""The baseline against its equations in float64: unpadded, closed-form statistics, dual solve."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest
import torch
from tiny_models import mlp_modules, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyeditfast_published import PublishedUltraEdit, published_scores, published_shift

Edit = tuple[str, str]
Rows = tuple[Tensor, Tensor]

EPSILON = 2.0**-23
LR = 1e-3
MICRO_BATCH = 5

EDITS: list[Edit] = [
    ("The capital of the old kingdom is", "a small town near the river"),
    ("Where was the painter born?", "London"),
    ("The singer plays", "the violin and the piano"),
    ("The mother tongue of the architect who works for the railway company is", "French"),
    ("The engineer was born in", "1871"),
    ("The official religion of the country is", "Latin"),
    ("What instrument does the engineer play? The engineer plays the", "harbour"),
    ("The bank was founded by", "the court"),
    ("The headquarters of the railway company are in the city of", "Islam"),
    ("Who is the painter of the island?", "the singer of the north"),
    ("Is", "French"),
    ("The language of the bank", "is the language of the old court in the north"),
    ("The river of the small town", "was the Zwin"),
    ("The violin", "is a river"),
    ("What is the capital?", "the harbour city"),
    ("The architect, the singer and the engineer were born in", "1902"),
    ("The island has", "two kings"),
    ("The piano of the court was founded in", "the old town"),
    ("Where are the headquarters of the bank?", "near the river"),
    ("Near", "the"),
    ("The north", "is the south"),
    ("The company that was founded in 1871 works for", "the painter"),
]
"""Two turns of 11: micro-batches of 5, 5 and 1 edits, the last one of a single answer token."""


def modules_of(model: nn.Module, family: str) -> list[str]:
    """Both down-projections, which share statistics, and one module of another shape."""
    names = mlp_modules(model, family)
    other = {"llama": "model.layers.1.mlp.up_proj", "gpt2": "transformer.h.1.mlp.c_fc"}[family]
    return [*names, other]


def in_and_out(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def rows_by_hand(
    model: nn.Module, tokenizer: Callable, names: Sequence[str], turn: Sequence[Edit]
) -> list[dict[str, Rows]]:
    """Keys and gradients by micro-batch and module, from one unpadded sequence at a time."""
    sequences = []
    for prompt, target in turn:
        target_ids = tokenizer(" " + target, add_special_tokens=False).input_ids
        sequences.append((tokenizer(prompt).input_ids + target_ids, len(target_ids)))
    sequences.sort(key=lambda sequence: -len(sequence[0]))
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def listen(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0], output

        return model.get_submodule(name).register_forward_hook(hook).remove

    removers = [listen(name) for name in names]
    batches = []
    for start in range(0, len(sequences), MICRO_BATCH):
        group = sequences[start : start + MICRO_BATCH]
        answers = sum(length for _, length in group)
        rows: dict[str, list[Rows]] = defaultdict(list)
        for ids, length in group:
            logits = model(torch.tensor([ids[:-1]])).logits[0, -length:]
            chosen = logits.log_softmax(-1)[range(length), ids[-length:]]
            gradients = torch.autograd.grad(-chosen.sum() / answers, [outputs[n] for n in names])
            for name, gradient in zip(names, gradients, strict=True):
                rows[name].append((inputs[name][0, -length:].detach(), gradient[0, -length:]))
        batches.append(
            {
                name: (torch.cat([k for k, _ in pairs]), torch.cat([g for _, g in pairs]))
                for name, pairs in rows.items()
            }
        )
    for remove in removers:
        remove()
    return batches


def moments_by_hand(batches: Sequence[Tensor], variance: str) -> tuple[Tensor, Tensor]:
    """Mean and std of all rows so far, from all of them at once."""
    rows = torch.cat(list(batches))
    mean = rows.mean(0)
    if variance == "unbiased":
        spread = (rows - mean).square().sum(0)
    else:
        spread = torch.zeros_like(mean)
        for batch in batches:
            size = len(batch)
            around = (batch - batch.mean(0)).square().sum(0)
            if size > 1:
                spread += size / (size - 1) * around
            spread += size * (batch.mean(0) - mean).square()
    return mean, (spread / (len(rows) - 1 + EPSILON)).sqrt()


class ByHand:
    """UltraEdit from its formulas, keeping every row it has seen."""

    def __init__(self, model: nn.Module, tokenizer: Callable, names: Sequence[str], variance: str):
        self.model, self.tokenizer, self.names, self.variance = model, tokenizer, names, variance
        self.seen: dict[tuple[int, int], list[Tensor]] = defaultdict(list)

    def edit_turn(self, turn: Sequence[Edit]) -> dict[str, Tensor]:
        batches = rows_by_hand(self.model, self.tokenizer, self.names, turn)
        for batch in batches:
            for name in self.names:
                shape = in_and_out(self.model.get_submodule(name))
                self.seen[shape].append(torch.cat(batch[name], -1).double())
        shifts = {}
        for name in self.names:
            module = self.model.get_submodule(name)
            d_in, d_out = in_and_out(module)
            mean, std = moments_by_hand(self.seen[d_in, d_out], self.variance)
            keys = torch.cat([batch[name][0] for batch in batches]).double()
            grads = torch.cat([batch[name][1] for batch in batches]).double()
            key_hat = (keys - mean[:d_in]) / (std[:d_in] + EPSILON)
            grad_hat = (grads - mean[d_in:]) / (std[d_in:] + EPSILON)
            values = torch.stack(
                [-LR * k.dot(k) * g for k, g in zip(key_hat, grad_hat, strict=True)]
            )
            dual = keys @ keys.T + torch.eye(len(keys), dtype=torch.float64)
            shift = keys.T @ torch.linalg.inv(dual) @ values
            shifts[name] = shift if isinstance(module, Conv1D) else shift.T
        with torch.no_grad():
            for name, shift in shifts.items():
                weight = self.model.get_submodule(name).weight
                weight += shift.to(weight.dtype)
        return shifts


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("variance", ["published", "unbiased"])
@pytest.mark.parametrize(("family", "bos"), [("llama", True), ("gpt2", False)])
def test_two_turns_equal_the_formulas_in_float64(family: str, bos: bool, variance: str) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    model = tiny_model(family, torch.float64)
    names = modules_of(model, family)
    before = copy.deepcopy(model)
    by_hand = ByHand(copy.deepcopy(model), tokenizer, names, variance)
    editor = PublishedUltraEdit(
        model,
        tokenizer,
        names,
        lr=LR,
        micro_batch=MICRO_BATCH,
        variance=variance,
        solve_dtype=torch.float64,
    )
    for turn in (EDITS[:11], EDITS[11:]):
        actual, expected = editor.edit_turn(turn), by_hand.edit_turn(turn)
        assert list(actual) == names
        for name in names:
            assert expected[name].norm() > 0.01
            assert relative_error(actual[name], expected[name]) < 1e-9, name
    for name in names:
        start = before.get_submodule(name).weight
        change = model.get_submodule(name).weight - start
        assert relative_error(change, by_hand.model.get_submodule(name).weight - start) < 1e-9
    others = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(parameter, others[name]), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_float32_is_close_to_the_formulas(family: str) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(family)
    names = modules_of(model, family)
    by_hand = ByHand(copy.deepcopy(model), tokenizer, names, "published")
    editor = PublishedUltraEdit(model, tokenizer, names, lr=LR, micro_batch=MICRO_BATCH)
    for turn in (EDITS[:11], EDITS[11:]):
        actual, expected = editor.edit_turn(turn), by_hand.edit_turn(turn)
        for name in names:
            assert actual[name].dtype == torch.float32
            assert relative_error(actual[name], expected[name]) < 1e-4, name


def test_the_variances_differ() -> None:
    tokenizer = tiny_tokenizer()
    shifts = []
    for variance in ("published", "unbiased"):
        model = tiny_model("llama")
        names = mlp_modules(model, "llama")
        editor = PublishedUltraEdit(model, tokenizer, names, lr=LR, variance=variance)
        shifts.append(editor.edit_turn(EDITS)[names[0]])
    assert relative_error(shifts[0], shifts[1]) > 1e-2


@pytest.mark.parametrize("variance", ["published", "unbiased"])
def test_a_micro_batch_of_one_row_leaves_the_statistics_finite(variance: str) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer(" French", add_special_tokens=False).input_ids) == 1
    model = tiny_model("llama")
    names = mlp_modules(model, "llama")
    editor = PublishedUltraEdit(
        model, tokenizer, names[:1], lr=LR, micro_batch=1, variance=variance
    )
    (moments,) = editor.moments.values()

    first = editor.edit_turn([("The mother tongue of the painter is", "French")])
    assert moments.count == 1
    # A single row is its own mean: nothing is left to edit with.
    assert torch.count_nonzero(first[names[0]]) == 0

    second = editor.edit_turn([("Is", "French"), ("Where was the painter born?", "London")])
    assert torch.isfinite(moments.std).all()
    assert torch.isfinite(second[names[0]]).all()
    assert second[names[0]].norm() > 0
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def state_of(model: nn.Module) -> tuple[list[bool], list[bool], list[bool], int]:
    return (
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [parameter.grad is None for parameter in model.parameters()],
        sum(len(module._forward_hooks) for module in model.modules()),
    )


def test_flags_modes_and_hooks_are_restored() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2")
    names = mlp_modules(model, "gpt2")
    untouched = copy.deepcopy(model)
    model.train()
    model.transformer.h[0].eval()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    model.get_submodule(names[0]).weight.requires_grad_(False)
    model.get_submodule(names[1]).weight.requires_grad_(True)
    expected = state_of(model)

    shifts = PublishedUltraEdit(model, tokenizer, names, lr=LR).edit_turn(EDITS)
    assert state_of(model) == expected
    # The dropout of a model in training mode takes no part in an edit.
    in_evaluation = PublishedUltraEdit(untouched, tokenizer, names, lr=LR).edit_turn(EDITS)
    for name in names:
        assert torch.equal(shifts[name], in_evaluation[name])

    published_scores(model, tokenizer, EDITS[:3])
    assert state_of(model) == expected


def test_a_module_outside_the_forward_pass_is_named_and_all_is_restored() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama").train()
    model.spare = nn.Linear(4, 4)
    weights = [parameter.clone() for parameter in model.parameters()]
    expected = state_of(model)
    editor = PublishedUltraEdit(model, tokenizer, [*mlp_modules(model, "llama"), "spare"], lr=LR)
    with pytest.raises(ValueError, match=r"does not use the modules \['spare'\]"):
        editor.edit_turn(EDITS)
    assert state_of(model) == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_conv1d_and_linear_of_the_same_function_get_transposed_shifts() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2")
    names = mlp_modules(model, "gpt2")
    twin = copy.deepcopy(model)
    for name in names:
        conv = model.get_submodule(name)
        assert isinstance(conv, Conv1D)
        linear = nn.Linear(*conv.weight.shape)
        linear.weight.data = conv.weight.data.T.contiguous()
        linear.bias.data = conv.bias.data.clone()
        twin.set_submodule(name, linear)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    shifts = PublishedUltraEdit(model, tokenizer, names, lr=LR).edit_turn(EDITS)
    twins = PublishedUltraEdit(twin, tokenizer, names, lr=LR).edit_turn(EDITS)
    for name in names:
        weight = model.get_submodule(name).weight
        assert shifts[name].shape == weight.shape == (64, 32)
        assert twins[name].shape == (32, 64)
        assert relative_error(shifts[name], twins[name].T) < 1e-4
        assert torch.equal(weight, before[name] + shifts[name])


def test_the_same_edits_give_the_same_bits() -> None:
    tokenizer = tiny_tokenizer()
    runs = []
    for _ in range(2):
        model = tiny_model("llama", torch.bfloat16)
        PublishedUltraEdit(model, tokenizer, mlp_modules(model, "llama"), lr=LR).edit(EDITS, 9)
        runs.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_edit_cuts_turns_and_edits_the_last_partial_one() -> None:
    tokenizer = tiny_tokenizer()
    model, twin = tiny_model("llama"), tiny_model("llama")
    names = mlp_modules(model, "llama")
    assert PublishedUltraEdit(model, tokenizer, names, lr=LR).edit(EDITS, turn_size=9) == 3
    editor = PublishedUltraEdit(twin, tokenizer, names, lr=LR)
    for turn in (EDITS[:9], EDITS[9:18]):
        editor.edit_turn(turn)
    last = editor.edit_turn(EDITS[18:])
    for name in names:
        assert last[name].norm() > 0
        assert torch.equal(model.get_submodule(name).weight, twin.get_submodule(name).weight)


@pytest.mark.parametrize("ridge", [1.0, 0.25])
def test_published_shift_solves_the_ridge_equation(ridge: float) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(7, 12, dtype=torch.float64, generator=generator)
    values = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    dual = keys @ keys.T + ridge * torch.eye(7, dtype=torch.float64)
    expected = keys.T @ torch.linalg.inv(dual) @ values
    assert relative_error(published_shift(keys, values, ridge), expected) < 1e-12


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_are_the_share_of_target_tokens_predicted_in_the_order_given(
    batch_size: int,
) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    model = tiny_model("llama")
    sequences = []
    for prompt, target in EDITS:
        target_ids = tokenizer(" " + target, add_special_tokens=False).input_ids
        sequences.append((torch.tensor(tokenizer(prompt).input_ids + target_ids), len(target_ids)))
    # Learn every other pair, so that the scores are neither all 0 nor all 1.
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        for ids, length in sequences[::2]:
            logits = model(ids[None, :-1]).logits[0, -length:]
            nn.functional.cross_entropy(logits, ids[-length:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = []
    for ids, length in sequences:
        with torch.no_grad():
            first_choice = model(ids[None, :-1]).logits[0, -length:].argmax(-1)
        expected.append((first_choice == ids[-length:]).double().mean().item())
    assert len(set(expected)) > 3 and 0.2 < sum(expected) / len(expected) < 0.9
    assert published_scores(model, tokenizer, EDITS, batch_size) == pytest.approx(expected)


def test_bad_arguments_are_named() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama")
    names = mlp_modules(model, "llama")
    with pytest.raises(ValueError, match=r"no module 'model\.layers\.9\.mlp\.down_proj'"):
        PublishedUltraEdit(model, tokenizer, ["model.layers.9.mlp.down_proj"])
    with pytest.raises(TypeError, match=r"'model\.norm' must be nn\.Linear .*RMSNorm"):
        PublishedUltraEdit(model, tokenizer, ["model.norm"])
    with pytest.raises(ValueError, match="distinct modules"):
        PublishedUltraEdit(model, tokenizer, [names[0], names[0]])
    with pytest.raises(ValueError, match="got 'pooled'"):
        PublishedUltraEdit(model, tokenizer, names, variance="pooled")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        PublishedUltraEdit(model, tokenizer, names, micro_batch=0)
    with pytest.raises(ValueError, match=r"ridge must be positive, got -1\.0"):
        PublishedUltraEdit(model, tokenizer, names, ridge=-1.0)
    editor = PublishedUltraEdit(model, tokenizer, names)
    with pytest.raises(ValueError, match="at least one edit"):
        editor.edit_turn([])
    with pytest.raises(ValueError, match="prompt '' has 0 tokens"):
        editor.edit_turn([("", "French")])
    with pytest.raises(ValueError, match="turn_size must be at least 1, got 0"):
        editor.edit(EDITS, turn_size=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        published_scores(model, tokenizer, EDITS, batch_size=0)
