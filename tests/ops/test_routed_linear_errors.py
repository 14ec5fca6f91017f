"""routed_linear: what it refuses, and what its kernels refuse."""

from __future__ import annotations

import importlib
import logging
import re

import pytest
import torch
from memories import (
    exact_gaps,
    exact_output,
    exact_route,
    routing_case,
)
from tolerances import floor, largest_error

from pyeditfast import backend, backends
from pyeditfast.backends import explain
from pyeditfast.ops import routed_linear
from pyeditfast.ops.memories import taking

# The package exports the function under the same name as its module.
op = importlib.import_module("pyeditfast.ops.routed_linear")

X, MAIN = torch.ones(2, 3, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "x has shape (3, 4); [batch, tokens, 4] is needed"),
        ({"x": X.half()}, ValueError, "x is torch.float16 and main torch.float32"),
        ({"main": MAIN.int()}, TypeError, "main has dtype torch.int32"),
        (
            {"sides": [MAIN, MAIN.T]},
            ValueError,
            "sides[1] is torch.float32 (4, 5); main is torch.float32 (5, 4)",
        ),
        ({"bias": torch.ones(4)}, ValueError, "bias is torch.float32 (4,); torch.float32 (5,)"),
        ({"activation": "swish"}, ValueError, "activation is 'swish'; choose one of None, 'silu'"),
        ({"reduction": "sum"}, ValueError, "reduction is 'sum'; choose one of mean, max, auto"),
        ({"mask": torch.ones(2, 3)}, ValueError, "mask is torch.float32 (2, 3); torch.bool (2, 3)"),
        ({"thresholds": [0.0, 0.0]}, TypeError, "thresholds is a list, not a torch.Tensor"),
        ({"thresholds": torch.zeros(2).int()}, TypeError, "thresholds has dtype torch.int32"),
        (
            {"thresholds": torch.zeros(3)},
            ValueError,
            "thresholds has shape (3,); there are 2 side memories",
        ),
        (
            {"thresholds": torch.zeros(())},
            ValueError,
            "thresholds has shape (); there are 2 side memories",
        ),
        (
            {"thresholds": torch.zeros(2, device="meta")},
            ValueError,
            "thresholds is on meta and x on cpu",
        ),
        ({"route": [0, -1]}, TypeError, "route is a list, not a torch.Tensor"),
        (
            {"route": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            "route is torch.int32 (2,); torch.int64 (2,) is needed",
        ),
        (
            {"route": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "route is torch.int64 (3,); torch.int64 (2,) is needed",
        ),
        (
            {"route": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "route is on meta and x on cpu",
        ),
        (
            {"route": torch.tensor([0, 2])},
            ValueError,
            "route holds 2; there are 2 side memories, and -1 is the main memory",
        ),
        (
            {"route": torch.tensor([-2, 1])},
            ValueError,
            "route holds -2; there are 2 side memories, and -1 is the main memory",
        ),
        (
            {"route": torch.tensor([-1, 0]), "sides": [], "thresholds": torch.zeros(0)},
            ValueError,
            "route holds 0; there are 0 side memories",
        ),
        ({"gate": 1.0}, TypeError, "gate is a float, not a torch.Tensor"),
        (
            {"gate": X[..., :3]},
            ValueError,
            "gate is torch.float32 (2, 3, 3); x is torch.float32 (2, 3, 4)",
        ),
        (
            {"gate": X.double()},
            ValueError,
            "gate is torch.float64 (2, 3, 4); x is torch.float32 (2, 3, 4)",
        ),
        ({"gate": X.to("meta")}, ValueError, "gate is on meta and x on cpu"),
        (
            {"gate": X, "gate_activation": "tanh"},
            ValueError,
            "gate_activation is 'tanh'; choose one of None, 'silu', 'gelu', 'gelu_tanh', 'relu'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_show_the_offending_value(changes, error, message):
    arguments = {"x": X, "main": MAIN, "sides": [MAIN] * 2, "thresholds": torch.zeros(2), **changes}
    with pytest.raises(error, match=re.escape(message)):
        routed_linear(**arguments)


def test_more_memories_than_a_kernel_takes(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(backends, "_interprets", lambda: False)
    monkeypatch.setattr(backends, "RUN_ON_A_GPU", frozenset({"routed_linear"}))
    backends._logged.clear()
    x, main, sides, bias = routing_case(10, 3, 7, 5, 9, torch.float64)
    gaps = exact_gaps(x, main, sides)
    ordered = gaps.sort(0).values
    thresholds = (ordered[:-1] + ordered[1:]).diagonal() / 2
    route = exact_route(gaps.tolist(), thresholds.tolist())
    assert {-1, 0, 8} <= set(route)
    reason = "its kernels take up to 8 side memories, not 9"
    with caplog.at_level(logging.INFO, logger="pyeditfast.backends"):
        routed = routed_linear(x, main, sides, thresholds, bias=bias)
    reasons = f"cuda not used: {reason}; triton not used: {reason}"
    assert f"routed_linear on cpu: torch ({reasons})" in caplog.messages
    assert routed.route.tolist() == route
    exact = exact_output(x, main, sides, route, bias)
    assert largest_error(routed.output, exact) <= floor(torch.float64, 7)
    with backend("triton"), pytest.raises(ValueError, match=re.escape(reason)):
        routed_linear(x, main, sides, thresholds, bias=bias)
    # On a GPU that has the kernel, eight memories are taken and nine are not.
    cuda, narrow = torch.device("cuda"), [main.float()] * 9
    choice = explain("routed_linear", taking(op.CANDIDATES, narrow[0], narrow[:8]), cuda)
    assert choice.backend == "triton"
    choice = explain("routed_linear", taking(op.CANDIDATES, narrow[0], narrow), cuda)
    assert choice.backend == "torch" and choice.reason.endswith(f"triton not used: {reason}")
    choice = explain("routed_linear", taking(op.CANDIDATES, narrow[0], []), cuda)
    assert choice.reason.endswith("triton not used: there is no side memory")
