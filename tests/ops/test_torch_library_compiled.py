"""Models that contain the operators of ``torch.library``, compiled as one graph."""

from __future__ import annotations

import shutil

import pytest
import torch
from ops.layouts import random_rows
from torch import Tensor, nn

from pyeditfast.ops import torch_library


def test_the_operators_are_registered():
    assert torch.ops.pyeditfast.routed_linear.default is torch_library.routed_linear._opoverload
    assert torch.ops.pyeditfast.activation_gap.default is torch_library.activation_gap._opoverload


class GatedBlock(nn.Module):
    """A gated feed-forward block whose down projection has side memories."""

    def __init__(self, memories: int, hidden: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.main = nn.Parameter(torch.empty(hidden, inner))
        self.sides = nn.ParameterList(torch.empty(hidden, inner) for _ in range(memories))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.register_buffer("thresholds", torch.full((memories,), 2.0))
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(random_rows(*parameter.shape, seed=seed, scale=0.5))

    def forward(self, x: Tensor, mask: Tensor, route: Tensor | None = None):
        up, gate = self.up(x), self.gate(x)
        sides = list(self.sides)
        output, chosen, _ = torch.ops.pyeditfast.routed_linear(
            *(up, self.main, sides, self.thresholds, self.bias, "silu", "auto", mask),
            *(route, gate, "silu"),
        )
        gaps = torch.ops.pyeditfast.activation_gap(
            *(up * gate, self.main, sides, self.bias, "none", "max", mask)
        )
        return x + output, chosen, gaps


def block_inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    mask = torch.arange(tokens) >= torch.arange(batch)[:, None] % tokens
    return random_rows(batch, tokens, 8, seed=batch), mask


def run(block: nn.Module, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Return the results, and the gradients of all parameters."""
    module.zero_grad()
    output, route, gaps = block(*inputs)
    (output.square().sum() + gaps.sum()).backward()
    return [output, route, gaps, *(parameter.grad for parameter in module.parameters())]


def needs_compiler(backend: str) -> str:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    return backend


@pytest.mark.parametrize(
    ("backend", "given"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_a_compiled_model_equals_eager(backend, given):
    torch._dynamo.reset()
    module = GatedBlock(2)
    compiled = torch.compile(module, fullgraph=True, backend=needs_compiler(backend))
    inputs = block_inputs(4, 3)
    if given:
        inputs = (*inputs, torch.tensor([1, -1, 0, 1]))
    expected = [part.clone() for part in run(module, module, *inputs)]
    assert len(set(expected[1].tolist())) > 1
    for result, wanted in zip(run(compiled, module, *inputs), expected, strict=True):
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("memories", [0, 2])
def test_batch_and_tokens_may_change(memories):
    torch._dynamo.reset()
    module = GatedBlock(memories)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=count)
    for batch, tokens in ((4, 3), (5, 7), (2, 2), (9, 120)):
        inputs = block_inputs(batch, tokens)
        expected = [part.clone() for part in run(module, module, *inputs) if part is not None]
        results = [part for part in run(compiled, module, *inputs) if part is not None]
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted)
    assert len(graphs) == 1
