"""The packed forward equals the padded one, for every family, and knows when it cannot."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import FAMILIES, mlp_modules, tiny_model

from pyeditfast.errors import UnsupportedWeightError
from pyeditfast.model.capture import capturing, frozen
from pyeditfast.model.edit_modules import find_edit_modules
from pyeditfast.model.gradients import turn_gradients
from pyeditfast.model.packing import (
    ATTENTION_NAME,
    PackedLayout,
    attention_configs,
    packed_attention,
    packed_attention_enabled,
)
from pyeditfast.model.passes import cut_passes, longest_first
from pyeditfast.model.runner import ModelRunner, packed_batch, padded_batch
from pyeditfast.model.sequences import AnswerSequence
from pyeditfast.phases import PhaseClock

PACKED = ("llama", "mistral", "qwen2", "gpt2", "gemma3", "phi3", "gpt_neox", "opt")


def sequences(lengths: list[int], seed: int = 0) -> list[AnswerSequence]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(3, 500, (length,), generator=generator).tolist()
        answers = 1 + index % min(3, length)
        targets = torch.randint(3, 500, (answers,), generator=generator).tolist()
        made.append(AnswerSequence(index, tuple(tokens), tuple(targets)))
    return made


def gradients(model, family, items, packing, tokens_per_pass=10_000):
    runner = ModelRunner(model, packing=packing, tokens_per_pass=tokens_per_pass)
    modules = find_edit_modules(model, mlp_modules(model, family))
    return turn_gradients(runner, modules, longest_first(items), PhaseClock())


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pack_as_expected(family):
    runner = ModelRunner(tiny_model(family))
    with frozen(runner.model):
        runner.batch(sequences([3]))
    assert runner.packing is (family in PACKED), runner.packing_reason


@pytest.mark.parametrize("family", PACKED)
def test_packed_equals_padded(family):
    # Shorter than gemma's window of 8, so that it packs.
    items = sequences([7, 7, 5, 3, 2, 1])
    model = tiny_model(family)
    packed = gradients(model, family, items, packing=True)
    padded = gradients(model, family, items, packing=False)
    assert packed.rows == padded.rows
    for ours, other in zip(packed.keys + packed.grads, padded.keys + padded.grads, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "opt"])
@pytest.mark.parametrize("tokens_per_pass", [1, 9, 17])
def test_any_cut_into_passes_gives_the_same_gradients(family, tokens_per_pass):
    items = sequences([9, 4, 4, 6, 1, 12, 3])
    model = tiny_model(family)
    whole = gradients(model, family, items, None)
    cut = gradients(model, family, items, None, tokens_per_pass)
    for ours, other in zip(cut.keys + cut.grads, whole.keys + whole.grads, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_16_bit_models(family, dtype):
    items = sequences([7, 5, 3])
    exact = gradients(tiny_model(family).double(), family, items, packing=False)
    halved = gradients(tiny_model(family, dtype), family, items, packing=None)
    assert all(keys.dtype == dtype for keys in halved.keys)
    assert all(grads.dtype == dtype for grads in halved.grads)
    for ours, other in zip(halved.keys, exact.keys, strict=True):
        assert (ours - other).norm() < 0.1 * other.norm()


def test_grouped_query_attention_packs():
    model = tiny_model("llama", heads=4, kv_heads=1)
    items = sequences([6, 5, 2])
    packed = gradients(model, "llama", items, True).grads[0]
    padded = gradients(model, "llama", items, False).grads[0]
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4 * padded.abs().max().item())


def test_a_window_shorter_than_a_prompt_is_padded():
    model = tiny_model("mistral", sliding_window=4)
    runner = ModelRunner(model)
    with frozen(model):
        assert "packed_layout" in runner.batch(sequences([4, 2])).inputs
        assert "packed_layout" not in runner.batch(sequences([5, 2])).inputs
    items = sequences([12, 3])
    whole = gradients(model, "mistral", items, None).grads[0]
    alone = [gradients(model, "mistral", [item], False).grads[0] for item in items]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_model_that_leaks_between_sequences_is_found_out(monkeypatch):
    model = tiny_model("llama")
    original = PackedLayout.positions
    monkeypatch.setattr(PackedLayout, "positions", lambda self: original(self) * 0 + 1)
    runner = ModelRunner(model)
    with frozen(model):
        batch = runner.batch(sequences([4, 2]))
    assert runner.packing is False
    assert "differ by" in runner.packing_reason
    assert "attention_mask" in batch.inputs


def test_nan_stays_in_its_own_sequence():
    model = tiny_model("llama")
    items = sequences([6, 6, 4, 2])
    poisoned = dataclasses.replace(items[1], tokens=(511, *items[1].tokens[1:]))
    with torch.no_grad():
        model.get_input_embeddings().weight[511] = float("nan")
    result = gradients(model, "llama", [items[0], poisoned, *items[2:]], packing=True)
    assert result.non_finite_sequences() == [1]
    clean = gradients(model, "llama", [items[0], *items[2:]], packing=True)
    kept = result.select([0, 2, 3])
    assert kept.rows == clean.rows
    for ours, other in zip(kept.keys + kept.grads, clean.keys + clean.grads, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_the_attention_is_restored_even_after_an_error():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with (
        pytest.raises(RuntimeError, match="stop"),
        packed_attention_enabled(attention_configs(model)),
    ):
        assert model.config._attn_implementation == ATTENTION_NAME
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before


def test_only_answer_positions_reach_the_head():
    model = tiny_model("llama")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    items = sequences([9, 4, 7])
    gradients(model, "llama", items, packing=True)
    handle.remove()
    answers = sum(len(item.targets) for item in items)
    assert seen[-1] == (1, answers, 512)


def test_no_weight_gradient_and_flags_restored():
    model = tiny_model("llama").train()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    gradients(model, "llama", sequences([5, 3]), packing=None)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[0].mlp.down_proj._forward_hooks


def test_gate_and_up_share_their_keys():
    model = tiny_model("llama")
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in (1, 2) for part in ("gate", "up")]
    modules = find_edit_modules(model, names)
    runner = ModelRunner(model, tokens_per_pass=100)
    result = turn_gradients(runner, modules, longest_first(sequences([5, 3])), PhaseClock())
    assert result.key_of == [0, 0, 1, 1]
    assert len(result.keys) == 2


def test_a_module_that_runs_twice_is_an_error():
    model = tiny_model("llama")
    modules = find_edit_modules(model, ["model.layers.1.mlp.down_proj"])
    batch = padded_batch(sequences([3]))
    x = torch.randn(1, 3, 64)
    with (
        pytest.raises(RuntimeError, match="ran more than once"),
        capturing(modules, batch.answer_slots, 3),
    ):
        modules[0].module(x)
        modules[0].module(x)


def test_layout_and_batches():
    items = sequences([4, 1, 3])
    packed, padded = packed_batch(items), padded_batch(items)
    assert packed.inputs["input_ids"].shape == (1, 8)
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert padded.inputs["attention_mask"].sum(1).tolist() == [4, 1, 3]
    flat_packed = packed.inputs["input_ids"].flatten()[packed.answer_slots]
    flat_padded = padded.inputs["input_ids"].flatten()[padded.answer_slots]
    assert flat_packed.tolist() == flat_padded.tolist()
    expected = [token for item in items for token in item.tokens[item.first_answer :]]
    assert flat_packed.tolist() == expected
    assert packed.targets.tolist() == [token for item in items for token in item.targets]


def test_passes_keep_order_and_bounds():
    items = longest_first(sequences([40, 3, 3, 3, 2, 2, 30, 30, 1]))
    passes = cut_passes(items, 64)
    assert [item for current in passes for item in current] == items
    for current in passes:
        tokens = sum(len(item) for item in current)
        assert tokens <= 64 or len(current) == 1
        assert len(current[0]) * len(current) <= 2 * tokens
    assert [len(item) for item in passes[0]] == [40]


def test_a_window_of_zero_means_none():
    model = tiny_model("llama")
    model.config.sliding_window = 0
    runner = ModelRunner(model)
    with frozen(model):
        assert "packed_layout" in runner.batch(sequences([9, 2])).inputs


def test_a_prompt_longer_than_an_attention_chunk_is_padded():
    model = tiny_model("llama")
    model.config.attention_chunk_size = 4
    runner = ModelRunner(model)
    with frozen(model):
        assert "packed_layout" in runner.batch(sequences([4, 2])).inputs
        assert "packed_layout" not in runner.batch(sequences([5, 2])).inputs


def test_a_leak_below_the_rounding_of_bf16_is_found_out(monkeypatch):
    model = tiny_model("llama", torch.bfloat16)
    embed = model.get_input_embeddings()

    def leak(module, inputs, output):
        # A recurrent layer would carry a little of every token to all later ones of the row.
        return output + 0.008 * output.cumsum(1) if output.shape[0] == 1 else output

    handle = embed.register_forward_hook(leak)
    runner = ModelRunner(model)
    with frozen(model):
        runner.batch(sequences([4, 2]))
    handle.remove()
    assert runner.packing is False
    assert "changes the outputs of the next" in runner.packing_reason


def test_an_output_changed_in_place_afterwards():
    """Falcon adds the attention to the MLP's output in place; the gradient is the output's own."""
    items = sequences([6, 4, 3])
    plain, in_place = tiny_model("llama"), tiny_model("llama")
    for layer in in_place.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: output.mul_(0.5))
    for layer in plain.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: output * 0.5)
    ours = gradients(in_place, "llama", items, True)
    expected = gradients(plain, "llama", items, True)
    for one, other in zip(ours.grads, expected.grads, strict=True):
        torch.testing.assert_close(one, other)


def test_modules_that_see_only_some_tokens_are_refused():
    model = tiny_model("llama")
    modules = find_edit_modules(model, ["lm_head"])
    runner = ModelRunner(model, tokens_per_pass=100)
    with pytest.raises(UnsupportedWeightError, match="lm_head saw 3 of 9 tokens"):
        turn_gradients(runner, modules, longest_first(sequences([6, 3])), PhaseClock())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_that_is_read_at_some_slots(kv_heads):
    lengths, slots = [5, 1, 7, 3], torch.tensor([0, 3, 4, 6, 12, 13])
    module = torch.nn.Identity()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 16, 8, generator=generator, dtype=torch.float64)
        for heads in (4, kv_heads, kv_heads)
    )
    for tensor in (query, key, value):
        tensor.requires_grad_()
    weights = torch.zeros(1, 16, 4, 8, dtype=torch.float64)
    weights[0, slots] = torch.randn(6, 4, 8, generator=generator, dtype=torch.float64)
    results = []
    for layout in (PackedLayout(lengths), PackedLayout(lengths, {module: slots})):
        attended, _ = packed_attention(module, query, key, value, None, packed_layout=layout)
        grads = torch.autograd.grad((attended * weights).sum(), (query, key, value))
        results.append((attended[0, slots], *grads))
    for found, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(found, expected)
    unread = [slot for slot in range(16) if slot not in slots.tolist()]
    assert (attended[0, unread] == 0).all()
    # Other modules attend everywhere.
    other, _ = packed_attention(torch.nn.Identity(), query, key, value, None, packed_layout=layout)
    assert (other[0, unread] != 0).any(-1).all()
