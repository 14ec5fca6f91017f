"""The route of a query belongs to its key-value cache: loops written by hand, prefixes, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from routed_models import (
    FAMILIES,
    RoutedModel,
    generate,
    memories_of,
    module_input,
    padded,
    random_prompts,
    routed_model,
)
from transformers import DynamicCache, StaticCache

from pyeditfast import reference
from pyeditfast.model import wise_linear

TOKENS = 6
PREFIX = 6


@pytest.fixture(scope="module", params=FAMILIES)
def routed(request) -> RoutedModel:
    return routed_model(request.param)


class Loop:
    """Greedy decoding by hand of one batch, its prompts passed in pieces of ``size`` columns."""

    def __init__(self, model, prompts, cache, size=None):
        self.model, self.cache = model, cache
        batch = padded(prompts)
        self.ids, self.mask = batch["input_ids"], batch["attention_mask"]
        self.start = self.ids.shape[1]
        self.logits = None
        for first in range(0, self.start, size or self.start):
            self._pass(first, min(first + (size or self.start), self.start))

    @torch.no_grad()
    def _pass(self, first, last):
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        output = self.model(
            self.ids[:, first:last],
            attention_mask=self.mask[:, :last],
            position_ids=positions[:, first:last],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache, self.logits = output.past_key_values, output.logits

    def step(self):
        token = self.logits[:, -1:].argmax(-1)
        self.ids = torch.cat([self.ids, token], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(token)], 1)
        self._pass(self.ids.shape[1] - 1, self.ids.shape[1])

    def answers(self):
        while self.ids.shape[1] < self.start + TOKENS:
            self.step()
        return self.ids[:, self.start :].tolist()


def empty_cache(kind, routed):
    if kind == "static":
        return StaticCache(config=routed.model.config, max_cache_len=40)
    return DynamicCache() if kind == "dynamic" else None


@pytest.mark.parametrize("size", [None, 4, 5])
@pytest.mark.parametrize("kind", ["dynamic", "static", "made by the model"])
def test_decoding_by_hand(routed, kind, size):
    loop = Loop(routed.model, routed.prompts, empty_cache(kind, routed), size)
    assert loop.answers() == routed.expected()
    assert memories_of(routed.layer) == routed.routes


@pytest.mark.parametrize("kind", ["dynamic", "static", "made by the model"])
def test_conversations_take_turns(routed, kind):
    halves = [routed.prompts[:4], routed.prompts[4:]]
    loops = [Loop(routed.model, half, empty_cache(kind, routed)) for half in halves]
    for _ in range(TOKENS - 1):
        for loop in loops:
            loop.step()
        routed.model(torch.tensor([[5, 6, 7]]))
    assert loops[0].answers() + loops[1].answers() == routed.expected()


def test_a_cache_that_was_reset(routed):
    cache = empty_cache("static", routed)
    assert Loop(routed.model, routed.prompts, cache).answers() == routed.expected()
    cache.reset()
    backwards = routed.prompts[::-1]
    assert Loop(routed.model, backwards, cache).answers() == routed.expected()[::-1]
    assert memories_of(routed.layer) == routed.routes[::-1]


def test_several_tokens_after_decoding_keep_the_route(routed):
    # As in the verification of candidates that another model made.
    for prompt, route in zip(routed.prompts, routed.routes, strict=True):
        loop = Loop(routed.model, [prompt], DynamicCache())
        loop.step()
        more = random_prompts([7], seed=9)
        with torch.no_grad():
            ours = routed.model(torch.tensor(more), past_key_values=loop.cache).logits
            whole = routed.plain[route](torch.cat([loop.ids, torch.tensor(more)], 1)).logits
        torch.testing.assert_close(ours, whole[:, -7:], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=FAMILIES)
def with_prefix(request) -> RoutedModel:
    (prefix,) = random_prompts([PREFIX], seed=7)
    prompts = [prefix + rest for rest in random_prompts([5] * 8, seed=8)]
    return routed_model(request.param, prompts, memories=1)


def prefix_cache(with_prefix):
    cache = DynamicCache()
    with torch.no_grad():
        with_prefix.model(torch.tensor(with_prefix.prompts[:1])[:, :PREFIX], past_key_values=cache)
    return cache


def test_prefix_computed_once(with_prefix):
    cache = prefix_cache(with_prefix)
    expected = zip(with_prefix.expected(), with_prefix.gaps, strict=True)
    for prompt, (answer, gaps) in zip(with_prefix.prompts, expected, strict=True):
        options = {"past_key_values": copy.deepcopy(cache)}
        assert generate(with_prefix.model, [prompt], **options) == [answer]
        (route,) = with_prefix.layer.routes()
        torch.testing.assert_close(torch.tensor(route.gaps), gaps)


def test_prefix_expanded_to_a_batch(with_prefix):
    cache = prefix_cache(with_prefix)
    cache.batch_repeat_interleave(8)
    columns = torch.tensor(with_prefix.prompts)[:, PREFIX:]
    answers = []
    for _ in range(TOKENS):
        with torch.no_grad():
            columns = with_prefix.model(columns, past_key_values=cache).logits[:, -1:].argmax(-1)
        answers.append(columns)
    assert memories_of(with_prefix.layer) == with_prefix.routes
    assert torch.cat(answers, 1).tolist() == with_prefix.expected()


def test_decoded_rows_expanded(routed):
    loop = Loop(routed.model, routed.prompts, DynamicCache())
    loop.cache.batch_repeat_interleave(2)
    loop.ids, loop.mask = (rows.repeat_interleave(2, 0) for rows in (loop.ids, loop.mask))
    loop.logits = loop.logits.repeat_interleave(2, 0)
    assert loop.answers() == [answer for answer in routed.expected() for _ in range(2)]


def test_generate_goes_on_with_a_returned_cache(routed):
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    for prompt in routed.prompts:
        turn = routed.model.generate(torch.tensor([prompt]), **options)
        cached = turn.past_key_values.get_seq_length()
        assert cached > len(prompt)
        (question,) = random_prompts([8], seed=4)
        longer = [*turn.sequences[0].tolist(), *question]
        generate(routed.model, [longer], past_key_values=turn.past_key_values)
        (route,) = routed.layer.routes()
        # All that was asked decides, and nothing that was answered out of the cache.
        gaps = token_gaps(routed, longer)
        asked = torch.cat([gaps[: len(prompt)], gaps[cached:]])
        torch.testing.assert_close(torch.tensor(route.gaps), asked.mean(0))


def token_gaps(routed, tokens):
    """Return the gaps ``[tokens, memories]`` of each token."""
    entered = module_input(routed.plain[-1], routed.name, tokens).transpose(0, 1)
    layer = routed.layer
    gaps = reference.activation_gap(
        entered, layer.main, layer.side_weights, bias=layer.bias, activation=layer.activation
    )
    return gaps.detach()


def test_cache_of_unknown_queries(routed):
    cache = DynamicCache()
    ids = torch.tensor(routed.prompts[:1])
    routed.plain[-1](ids, past_key_values=cache)
    with pytest.raises(ValueError, match=f"the cache holds {ids.shape[1]} columns whose queries"):
        routed.model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=f"the cache holds {ids.shape[1]} columns whose queries"):
        generate(routed.model, [routed.prompts[0] + [5]], past_key_values=cache)
    assert generate(routed.model, routed.prompts) == routed.expected()


def test_any_cache_will_do_without_memories():
    routed = routed_model("llama")
    routed.layer.set_memories([], [])
    cache = DynamicCache()
    ids = torch.tensor(routed.prompts[:1])
    routed.plain[-1](ids[:, :2], past_key_values=cache)
    ours = routed.model(ids[:, 2:], past_key_values=cache).logits
    whole = routed.plain[-1](ids).logits[:, 2:]
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


def test_memories_that_changed_meanwhile():
    routed = routed_model("llama")
    for size in (1, 3):
        loop = Loop(routed.model, routed.prompts, DynamicCache())
        routed.layer.set_memories(routed.layer.side_weights, [0.0, 0.0])
        with pytest.raises(ValueError, match="filled with other side memories"):
            routed.model(torch.full((8, size), 7), past_key_values=loop.cache)


def test_rows_that_do_not_fit_the_queries(routed):
    loop = Loop(routed.model, routed.prompts, DynamicCache())
    loop.cache.batch_select_indices(torch.arange(5))
    with pytest.raises(ValueError, match="5 rows go on with 8 queries"):
        routed.model(torch.full((5, 1), 7), past_key_values=loop.cache)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(60, 70), (100, 30), (101, 29), (40, 40, 50), (3, 99)])
def test_pieces_of_a_prompt_that_gets_long_have_the_gaps_of_the_whole(sizes, masked, monkeypatch):
    routed = routed_model("llama")
    asked = []
    whole = wise_linear.activation_gap
    monkeypatch.setattr(
        wise_linear,
        "activation_gap",
        lambda *a, **k: asked.append(k["reduction"]) or whole(*a, **k),
    )
    ids = torch.tensor(random_prompts([sum(sizes)] * 2, seed=4))
    mask = torch.ones_like(ids)
    if masked:
        mask[0, :2] = 0
    cache = DynamicCache()

    def run(first, last, cache):
        routed.model(
            ids[:, first:last],
            attention_mask=mask[:, :last],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, first:last],
            past_key_values=cache,
        )
        return routed.layer.routes()

    with torch.no_grad():
        first = 0
        for size in sizes:
            found = run(first, first + size, cache)
            first += size
            if first == size:
                # The first piece takes the products once, unless pads hide who is long.
                assert asked == (["max"] if masked and size > 100 else [])
        expected = run(0, first, DynamicCache())
    for one, other in zip(found, expected, strict=True):
        assert one.memory == other.memory
        assert one.gaps == pytest.approx(other.gaps, rel=1e-4)
