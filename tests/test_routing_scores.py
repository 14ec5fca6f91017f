"""Routes in evaluation: decided by the prompt alone, counted rightly, and told."""

from __future__ import annotations

import json
import math

import pytest
import torch
from facts import facts
from tiny_models import tiny_model, tiny_tokenizer

from pyeditfast import routing_scores
from pyeditfast.evaluation import KINDS, answer_accuracy, evaluate
from pyeditfast.model.query_routing import Route
from pyeditfast.model.runner import ModelRunner
from pyeditfast.model.sequences import AnswerSequence
from pyeditfast.model.wise_linear import WiseLinear, install
from pyeditfast.routing_scores import RoutingScores, RoutingTally

MODULE = "model.layers.1.mlp.down_proj"


def prompt_routes(model, layer: WiseLinear, prompts: list[str]) -> list[Route]:
    """Return the routes of prompts alone, each in a pass of its own."""
    tokenizer = tiny_tokenizer()
    routes = []
    for prompt in prompts:
        with torch.no_grad():
            model(**tokenizer(prompt, return_tensors="pt"), use_cache=False)
        routes += layer.routes()
    return routes


@pytest.fixture
def routed():
    """Return a model with two strong side memories that answer some of the prompts."""
    model = tiny_model("llama")
    layer = install(model, MODULE, activation="silu", reduction="auto")
    draw = torch.Generator().manual_seed(5)
    weight = layer.weight.detach()
    sides = [weight + torch.randn(weight.shape, generator=draw) for _ in range(2)]
    layer.set_memories(sides, [0.0, 0.0])
    gaps = [route.gaps for route in prompt_routes(model, layer, [e.prompt for e in facts(40)])]
    # A quarter of the prompts pass either threshold, each of them midway between two gaps.
    columns = [sorted(column) for column in zip(*gaps, strict=True)]
    layer.set_memories(sides, [(column[29] + column[30]) / 2 for column in columns])
    return model, layer


def test_shares_and_gaps_are_those_of_the_prompts_alone(routed):
    model, layer = routed
    edits = facts(40)
    scores = evaluate(model, tiny_tokenizer(), iter(edits)).routing
    assert scores is not None
    told = {
        "efficacy": [edit.prompt for edit in edits],
        "generalization": [str(edit.rephrase) for edit in edits],
        "specificity": [str(edit.locality_prompt) for edit in edits],
    }
    for kind, prompts in told.items():
        routes = prompt_routes(model, layer, prompts)
        share = sum(route.memory >= 0 for route in routes) / len(routes)
        wanted = 1 - share if kind == "specificity" else share
        assert getattr(scores, kind) == pytest.approx(wanted)
        for route, gap, memory in zip(
            routes, scores.gaps[kind], scores.memories[kind], strict=True
        ):
            assert gap == pytest.approx(route.gaps[memory], rel=1e-4)
            assert route.memory in (-1, memory)
    assert 0 < scores.efficacy < 1
    assert set(scores.memories["efficacy"]) == {0, 1}
    assert scores.portability is None
    assert scores.counts == {
        "efficacy": 40,
        "generalization": 40,
        "specificity": 40,
        "portability": 0,
    }
    assert scores.thresholds == pytest.approx(layer.thresholds.tolist())


@pytest.mark.parametrize("packing", [True, False])
def test_target_tokens_do_not_change_the_route(routed, packing):
    """What greedy generation gives is scored as exact, so the route was that of generation."""
    model, _ = routed
    tokenizer = tiny_tokenizer()
    sequences = []
    for number, edit in enumerate(facts(40)):
        prompt = tokenizer(edit.prompt, return_tensors="pt")
        length = prompt["input_ids"].shape[1]
        written = model.generate(
            **prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0].tolist()
        sequences.append(AnswerSequence(number, tuple(written[:-1]), tuple(written[length:])))
    answers = answer_accuracy(ModelRunner(model, packing=packing), sequences)
    assert [number for number in range(40) if not answers[number].exact] == []
    routes = {answer.route.memory for answer in answers.values() if answer.route is not None}
    assert routes == {-1, 0, 1}


def test_a_model_without_side_memories_has_no_routes():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plain = evaluate(model, tokenizer, facts(3))
    assert plain.routing is None
    assert plain.to_dict()["routing"] is None
    assert "routed" not in str(plain)
    layer = install(model, MODULE, activation="silu", reduction="auto")
    assert evaluate(model, tokenizer, facts(3)).routing is None
    layer.set_memories([layer.weight.detach() + 1], [0.5])
    assert evaluate(model, tokenizer, facts(3)).routing is not None
    assert evaluate(model, tokenizer, []).routing is None
    layer.set_memories([], [])
    assert evaluate(model, tokenizer, facts(3)).routing is None


def test_the_gap_told_is_that_of_the_memory_that_decides():
    tally = RoutingTally(KINDS)
    thresholds = (2.0, 8.0)
    for gaps, memory in (
        ((3.0, 9.0), 1),  # both pass; the router took the largest gap
        ((3.0, 7.0), 0),
        ((1.5, 7.0), -1),  # 0.75 and 0.875 of the thresholds
        ((1.9, 7.0), -1),
        ((math.nan, 1.0), -1),
    ):
        tally.add("efficacy", Route(memory, gaps, thresholds))
    tally.add("specificity", Route(-1, (1.0, 1.0), thresholds))
    scores = tally.scores()
    assert scores is not None
    assert scores.gaps == {"efficacy": [9.0, 3.0, 7.0, 1.9, 1.0], "specificity": [1.0]}
    assert scores.memories == {"efficacy": [1, 0, 1, 0, 1], "specificity": [0]}
    assert scores.relative_gaps("efficacy") == pytest.approx([9 / 8, 1.5, 7 / 8, 0.95, 1 / 8])
    assert (scores.efficacy, scores.specificity) == (0.4, 1.0)
    assert str(scores) == (
        "routed as wanted: efficacy 0.400, specificity 1.000\n"
        "median gap over threshold: efficacy 0.95, specificity 0.5 (2 side memories)"
    )


def test_a_threshold_of_zero_is_passed_by_any_gap():
    tally = RoutingTally(KINDS)
    tally.add("efficacy", Route(0, (3.0,), (0.0,)))
    tally.add("efficacy", Route(-1, (0.0,), (0.0,)))
    scores = tally.scores()
    assert scores is not None
    assert scores.relative_gaps("efficacy") == [math.inf, 1.0]
    assert "median gap: efficacy 1.5 (threshold 0)" in str(scores)


def test_more_gaps_than_are_kept_leave_a_fair_sample(monkeypatch):
    monkeypatch.setattr(routing_scores, "KEPT", 200)
    tally = RoutingTally(KINDS)
    for number in range(4000):
        tally.add("generalization", Route(0 if number < 1000 else -1, (float(number),), (5.0,)))
    scores = tally.scores()
    assert scores is not None
    assert scores.generalization == 0.25
    assert scores.counts["generalization"] == 4000
    kept = scores.gaps["generalization"]
    assert len(set(kept)) == len(kept) == len(scores.memories["generalization"]) == 200
    # The mean of 200 of 0 … 3999 has a standard deviation of 80; the seed is fixed.
    assert 1800 < sum(kept) / len(kept) < 2200


def test_scores_are_json_ready():
    scores = RoutingScores(
        efficacy=0.5,
        counts={"efficacy": 2},
        thresholds=(math.inf,),
        gaps={"efficacy": [1.0, math.nan]},
        memories={"efficacy": [0, 0]},
    )
    told = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert told["gaps"] == {"efficacy": [1.0, None]}
    assert told["thresholds"] == [None]
    assert told["efficacy"] == 0.5
