"""The published WISE router and TIES merge against the reference functions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from pyeditfast.reference.activation_gap import activation_gap
from pyeditfast.reference.ties_merge import ties_merge
from pyeditfast_published import published_ties
from pyeditfast_published.wise_layer import PublishedWiseLayer


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def router(retrieve: bool = True, activation: str | None = "silu") -> PublishedWiseLayer:
    """A module of 4 features whose side memories move one output each; thresholds of 1."""
    act = nn.functional.silu if activation else lambda x: x
    linear = nn.Linear(4, 4).double()
    with torch.no_grad():
        linear.weight.copy_(torch.eye(4))
        layer = PublishedWiseLayer(linear, act, act_ratio=0.5, retrieve=retrieve)
        layer.side_weight[0, 0] += 1
    for feature in (1, 2):
        memory = torch.eye(4, dtype=torch.float64)
        memory[feature, feature] += 1
        layer.memories.append(memory)
        layer.memory_gaps.append(2.0)
    layer.smallest_gap = 2.0
    return layer


def tokens_of(*features: Sequence[float]) -> Tensor:
    """A row of tokens, each of four features."""
    return torch.tensor([list(features)], dtype=torch.float64)


@torch.no_grad()
def test_the_router_takes_the_largest_gap_above_its_threshold() -> None:
    layer = router(activation=None)
    cases = [
        ((0.9, 0.5, 0.0, 9.0), -1, layer.layer.weight),
        ((1.0, 0.5, 0.0, 9.0), 2, layer.side_weight),
        ((1.2, 1.5, 1.3, 9.0), 0, layer.memories[0]),
        ((1.2, 1.3, 1.5, 9.0), 1, layer.memories[1]),
        ((1.5, 1.2, 1.4, 9.0), 2, layer.side_weight),
        ((0.0, 1.0, 0.0, 9.0), -1, layer.layer.weight),
    ]
    for features, route, weight in cases:
        x = tokens_of(features)
        output = layer(x)
        assert layer.route == route, features
        assert torch.equal(output, nn.functional.linear(x, weight, layer.layer.bias))
    # A side weight below its own threshold still outdoes a memory above its lower one.
    layer.smallest_gap, layer.memory_gaps = 4.0, [1.0, 1.0]
    layer(tokens_of((1.5, 1.2, 0.0, 0.0)))
    assert layer.route == -1


@torch.no_grad()
def test_the_router_decides_once_for_all_rows_from_the_tokens_of_the_call() -> None:
    layer = router(activation=None)
    edited, other = (2.5, 0.0, 0.0, 1.0), (0.1, 0.0, 0.0, 1.0)
    both = torch.cat([tokens_of(edited, edited), tokens_of(other, other)])
    assert torch.equal(layer(both), nn.functional.linear(both, layer.side_weight, layer.layer.bias))
    for row, route in zip(both.split(1), (2, -1), strict=True):
        layer(row)
        assert layer.route == route
    # The newest token alone, as in cached decoding, may go elsewhere than its query.
    query = tokens_of(edited, other)
    routes = []
    for call in (query, query[:, :1], query[:, 1:]):
        layer(call)
        routes.append(layer.route)
    assert routes == [2, 2, -1]
    layer(query[0])
    assert layer.route == 2


@torch.no_grad()
def test_a_call_of_more_than_100_tokens_is_judged_by_its_largest_token() -> None:
    layer = router(activation=None)
    x = torch.zeros(1, 101, 4, dtype=torch.float64)
    x[0, -1, 0] = 50.0
    layer(x[:, 1:])
    assert layer.route == -1
    layer(x)
    assert layer.route == 2


@torch.no_grad()
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_router_s_gaps_are_those_of_the_reference(activation: str | None) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = router(activation=activation)
    x = torch.randn(3, 7, 4, dtype=torch.float64, generator=generator)
    main, bias = layer.layer.weight, layer.layer.bias
    expected = activation_gap(
        x, main, layer.memories, bias=bias, activation=activation, reduction="auto"
    )
    original = layer.original_layer(x)
    for number, memory in enumerate(layer.memories):
        gap = layer.call_gap(original, layer.apply_weight(x, memory))
        assert gap == pytest.approx(expected[:, number].mean().item(), rel=1e-12)


@torch.no_grad()
def test_without_retrieval_the_larger_gap_answers_unless_both_are_small() -> None:
    layer = router(retrieve=False, activation=None)
    main = layer.main_weight.clone()
    layer.layer.weight = nn.Parameter(layer.memories[0])
    cases = [
        ((0.9, 0.8, 0, 1), -1, main),
        ((0.9, 1.1, 0, 1), 0, layer.memories[0]),
        ((1.2, 1.1, 0, 1), 1, layer.side_weight),
    ]
    for features, route, weight in cases:
        x = tokens_of(features)
        output = layer(x)
        assert layer.route == route
        assert torch.equal(output, nn.functional.linear(x, weight, layer.layer.bias))


@pytest.mark.parametrize("density", [0.1, 0.53, 1.0])
@pytest.mark.parametrize("weights", [None, (0.2, 0.5, 0.3)])
def test_ties_by_topk_is_the_reference_s_merge(
    density: float, weights: tuple[float, ...] | None
) -> None:
    generator = torch.Generator().manual_seed(2)
    main = torch.randn(37, 21, generator=generator)
    sides = [main + 0.1 * torch.randn(37, 21, generator=generator) for _ in range(3)]
    merged = published_ties(main, sides, density, weights)
    expected = ties_merge(main, sides, density, weights)
    assert relative_error(merged - main, expected - main) < 1e-6
    assert ((merged == main) == (expected == main)).all()
    kept = (published_ties(main, sides[:1], density) != main).sum()
    assert kept == int(density * main.numel())


def test_ties_keeps_a_count_where_magnitudes_are_equal() -> None:
    main = torch.zeros(4, 5)
    assert (published_ties(main, [main + 1], 0.5) != 0).sum() == 10
    assert (ties_merge(main, [main + 1], 0.5) != 0).sum() == 20


def test_bad_arguments_of_ties_are_named() -> None:
    main = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"got sides \[\(3, 2\)\] and 1 weights"):
        published_ties(main, [main.T], 0.5)
    with pytest.raises(ValueError, match=r"got sides \[\] and 1 weights"):
        published_ties(main, [], 0.5, [1.0])
    with pytest.raises(ValueError, match=r"density of 0\.1 keeps none of 6"):
        published_ties(main, [main], 0.1)
