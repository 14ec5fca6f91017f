"""The C++ forms against plain torch on the CPU, on 58.7M elements each.

The baseline of a group, ``torch``, is the op's own torch form, or a better one from
``plain_torch.py`` where that exists without cutting into blocks that stay in the cache; such forms
are contenders of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import plain_torch
import pytest
import torch
from torch import Tensor

from pyeditfast import reference
from pyeditfast.backends import backend
from pyeditfast.ops import (
    RunningMoments,
    Shift,
    apply_shift_,
    edit_values,
    linear_cross_entropy,
    magnitude_threshold,
    masked_sgd_,
    masked_sgd_product_,
    random_mask,
    ties_merge,
)
from pyeditfast.ops.activation_gap import gaps_of_outputs
from pyeditfast.reference.activation_gap import token_gaps

SHAPE = (4096, 14336)
SMALL = (64, 1000)
"""What the results are checked on."""

ELEMENTS = SHAPE[0] * SHAPE[1]
RATIO, DENSITY, LR = 0.2, 0.53, 1e-6
TOKENS = 240
STEP = {"seed": 5, "ratio": RATIO, "lr": 1.0, "weight_decay": 1e-5, "norm_constraint": 1.0}

HALVES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)


def contenders(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("contender", ["torch", *names, "pyeditfast"])


def numbers(
    shape: Sequence[int], scale: float, dtype: torch.dtype = torch.float32, seed: int | None = None
) -> Tensor:
    """Return normal numbers; other ones at every call unless there is a seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.empty(shape).normal_(0, scale, generator=generator).to(dtype)


def under(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` with a backend of its own."""

    def insisting(*arguments: Any) -> Any:
        with backend(name):
            return run(*arguments)

    return insisting


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def measure(
    benchmark: Any,
    what: str,
    contender: str,
    forms: dict[str, Callable[..., Any]],
    fresh: Callable[[], tuple[Any, ...]],
    least_bytes: int,
    rounds: int = 5,
) -> None:
    """Time one form of a group. A torch form of seconds gets two rounds and no more."""
    benchmark.group = f"C++: {what}"
    benchmark.name = contender
    benchmark.extra_info["least_bytes"] = least_bytes
    benchmark.pedantic(
        forms[contender], setup=lambda: (fresh(), {}), rounds=rounds, warmup_rounds=int(rounds > 2)
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bench_copy(benchmark):
    """What memory gives: the other groups' bytes a second compare with it."""
    target = torch.zeros(SHAPE)
    measure(
        benchmark,
        "copy, float32",
        "torch",
        {"torch": target.copy_},
        lambda: (numbers(SHAPE, 1.0),),
        8 * ELEMENTS,
    )


@DTYPES
@contenders("add_")
def bench_nearest(benchmark, contender, dtype):
    apply_shift(benchmark, contender, dtype, "nearest", tensors=2)


@DTYPES
@contenders()
def bench_compensated(benchmark, contender, dtype):
    apply_shift(benchmark, contender, dtype, "compensated", tensors=4)


@HALVES
@contenders()
def bench_stochastic(benchmark, contender, dtype):
    apply_shift(benchmark, contender, dtype, "stochastic", tensors=2, slow=True)


def apply_shift(benchmark, contender, dtype, rounding, tensors, slow=False):
    def inputs(shape, *seeds):
        weight, change = (
            numbers(shape, scale, kind, seed)
            for scale, kind, seed in zip(
                (0.02, 1e-4), (dtype, torch.float32), seeds or (None, None), strict=True
            )
        )
        shift = Shift("primal", min(shape), matrix=change)
        return weight, shift, weight * 2.0**-10 if rounding == "compensated" else None

    def run(weight, shift, remainder):
        seed = 7 if rounding == "stochastic" else None
        return apply_shift_(weight, shift, rounding, seed, remainder=remainder)

    if contender == "pyeditfast":
        results = []
        for name in ("torch", "cpp"):
            arguments = inputs(SMALL, 1, 2)
            results.append((under(name, run)(*arguments), arguments[2]))
        for expected, found in zip(*results, strict=True):
            assert expected is None or torch.equal(found, expected)
        benchmark.extra_info["equal_to_torch"] = True
    forms = {
        "torch": under("torch", run),
        "add_": lambda weight, shift, remainder: weight.add_(shift.matrix),
        "pyeditfast": under("cpp", run),
    }
    measure(
        benchmark,
        f"dense shift, rounding {rounding}, {name_of(dtype)}",
        contender,
        forms,
        lambda: inputs(SHAPE),
        # The range is checked before anything is written, so the shift is read twice.
        (8 + tensors * dtype.itemsize) * ELEMENTS,
        rounds=2 if slow and contender == "torch" else 5,
    )


@contenders("torch.rand")
def bench_random_mask(benchmark, contender):
    def run(seed, shape=SHAPE):
        return random_mask(seed, RATIO, shape)

    if contender == "pyeditfast":
        found = under("cpp", run)(3, SMALL)
        assert torch.equal(found, reference.random_mask(3, RATIO, SMALL))
        benchmark.extra_info["equal_to_the_reference"] = True
    forms = {
        "torch": under("torch", run),
        # Other numbers, which depend on all drawn before.
        "torch.rand": lambda seed: torch.rand(SHAPE) < RATIO,
        "pyeditfast": under("cpp", run),
    }
    seeds = iter(range(100))
    measure(
        benchmark,
        "random mask",
        contender,
        forms,
        lambda: (next(seeds),),
        ELEMENTS,
        rounds=2 if contender == "torch" else 9,
    )


@DTYPES
@contenders("torch, mask stored")
def bench_masked_sgd(benchmark, contender, dtype):
    def inputs(shape, seed=None):
        main = numbers(shape, 0.02, dtype, seed)
        return main.clone(), numbers(shape, 1e-3, seed=seed), main

    def run(weight, grad, main):
        return masked_sgd_(weight, grad, main, **STEP)

    if contender == "pyeditfast":
        expected = reference.masked_sgd_(*inputs(SMALL, 1), **STEP)
        assert torch.equal(under("cpp", run)(*inputs(SMALL, 1)), expected)
        benchmark.extra_info["equal_to_the_reference"] = True
    left_out = ~random_mask(STEP["seed"], RATIO, SHAPE)
    forms = {
        "torch": under("torch", run),
        "torch, mask stored": lambda weight, grad, main: plain_torch.step_with_stored_mask(
            weight, grad, main, left_out, STEP["weight_decay"], STEP["norm_constraint"]
        ),
        "pyeditfast": under("cpp", run),
    }
    measure(
        benchmark,
        f"masked step, {name_of(dtype)}",
        contender,
        forms,
        lambda: inputs(SHAPE),
        (4 + 3 * dtype.itemsize) * ELEMENTS,
        rounds=2 if contender == "torch" else 5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@contenders("torch, mask stored")
def bench_masked_sgd_product(benchmark, contender, dtype):
    def inputs(shape, seed=None):
        main = numbers(shape, 0.02, dtype, seed)
        vectors = [numbers((TOKENS, d), 0.03, torch.float32, seed) for d in shape]
        return main.clone(), *vectors, main

    def run(weight, output_grads, inputs, main):
        return masked_sgd_product_(weight, output_grads, inputs, main, **STEP)

    def with_stored_mask(weight, output_grads, inputs, main):
        plain_torch.step_with_stored_mask(
            *(weight, output_grads.mT @ inputs, main, left_out),
            *(STEP["weight_decay"], STEP["norm_constraint"]),
        )

    if contender == "pyeditfast":
        exact = reference.masked_sgd_product_(*(part.double() for part in inputs(SMALL, 1)), **STEP)
        error = relative_error(under("cpp", run)(*inputs(SMALL, 1)), exact)
        benchmark.extra_info["relative_error"] = error
        assert error <= torch.finfo(dtype).eps
    left_out = ~random_mask(STEP["seed"], RATIO, SHAPE)
    measure(
        benchmark,
        f"masked step of a product, {TOKENS} tokens, {name_of(dtype)}",
        contender,
        {
            "torch": under("torch", run),
            "torch, mask stored": with_stored_mask,
            "pyeditfast": under("cpp", run),
        },
        lambda: inputs(SHAPE),
        3 * dtype.itemsize * ELEMENTS,
        rounds=2 if contender == "torch" else 5,
    )


@DTYPES
@contenders()
def bench_magnitude_threshold(benchmark, contender, dtype):
    def run(x):
        return magnitude_threshold(x, DENSITY)

    if contender == "pyeditfast":
        x = numbers(SMALL, 1.0, dtype, 1)
        assert torch.equal(under("cpp", run)(x), reference.magnitude_threshold(x, DENSITY))
        benchmark.extra_info["equal_to_the_reference"] = True
    measure(
        benchmark,
        f"magnitude threshold, {name_of(dtype)}",
        contender,
        {"torch": under("torch", run), "pyeditfast": under("cpp", run)},
        lambda: (numbers(SHAPE, 1.0, dtype),),
        # One digit settles a number of 16 bits, two one of 32.
        ELEMENTS * (2 if dtype.itemsize == 2 else 8),
        rounds=3 if contender == "torch" else 5,
    )


@DTYPES
@contenders()
def bench_ties_merge(benchmark, contender, dtype):
    def inputs(shape, seed=None):
        main = numbers(shape, 0.02, seed=seed)
        sides = []
        for shard in range(2):
            moved = numbers(shape, 0.01, seed=None if seed is None else seed + 1 + shard)
            moved.masked_fill_(~random_mask(shard, RATIO, shape), 0.0)
            sides.append(moved.add_(main).to(dtype))
        return main.to(dtype), sides

    def run(main, sides):
        return ties_merge(main, sides, DENSITY)

    if contender == "pyeditfast":
        main, sides = inputs(SMALL, 1)
        expected = reference.ties_merge(main, sides, DENSITY)
        assert torch.equal(under("cpp", run)(main, sides), expected)
        benchmark.extra_info["equal_to_the_reference"] = True
    measure(
        benchmark,
        f"TIES of two shards, {name_of(dtype)}",
        contender,
        {"torch": under("torch", run), "pyeditfast": under("cpp", run)},
        lambda: inputs(SHAPE),
        # Two passes over a shard and the main memory for each threshold, one over all, one written.
        12 * dtype.itemsize * ELEMENTS,
        rounds=2 if contender == "torch" else 5,
    )


@DTYPES
@contenders("torch in blocks")
def bench_edit_values(benchmark, contender, dtype):
    d_in, d_out = 14336, 4096
    rows = ELEMENTS // (d_in + d_out)
    moments = RunningMoments(d_in + d_out)
    moments.update(numbers((100, d_in + d_out), 2.0, seed=1))
    mean, scale = moments.mean_and_scale(torch.device("cpu"))

    def run(keys, grads):
        return edit_values(keys, grads, moments, LR)

    def inputs(count, seed=None):
        return numbers((count, d_in), 1.0, dtype, seed), numbers((count, d_out), 0.1, dtype, seed)

    if contender == "pyeditfast":
        keys, grads = inputs(50, 2)
        keys_hat = (keys.double() - mean[:d_in]) * scale[:d_in]
        grads_hat = (grads.double() - mean[d_in:]) * scale[d_in:]
        exact = -LR * keys_hat.square().sum(-1, keepdim=True) * grads_hat
        error = relative_error(under("cpp", run)(keys, grads), exact)
        assert error <= 1e-6
        benchmark.extra_info["relative_error"] = error
    forms = {
        "torch": under("torch", run),
        "torch in blocks": lambda keys, grads: plain_torch.edit_values_in_blocks(
            keys, grads, mean, scale, LR
        ),
        "pyeditfast": under("cpp", run),
    }
    measure(
        benchmark,
        f"edit values 14336→4096, {name_of(dtype)}",
        contender,
        forms,
        lambda: inputs(rows),
        rows * ((d_in + d_out) * dtype.itemsize + 4 * d_out),
    )


@DTYPES
@contenders("torch in blocks")
def bench_activation_gap(benchmark, contender, dtype):
    tokens, d_out = SHAPE[1], SHAPE[0]

    def run(main, side):
        return gaps_of_outputs(main[:, None], [side[:, None]], "silu", "mean", None)

    def inputs(count, seeds=(None, None)):
        return tuple(numbers((count, d_out), 1.0, dtype, seed) for seed in seeds)

    if contender == "pyeditfast":
        main, side = inputs(50, (1, 2))
        exact = token_gaps(main.double(), side.double(), "silu")
        error = relative_error(under("cpp", run)(main, side).squeeze(-1), exact)
        assert error <= 1e-6
        benchmark.extra_info["relative_error"] = error
    forms = {
        "torch": plain_torch.silu_gaps,
        "torch in blocks": plain_torch.silu_gaps_in_blocks,
        "pyeditfast": under("cpp", run),
    }
    measure(
        benchmark,
        f"activation gap of two outputs, silu, {name_of(dtype)}",
        contender,
        forms,
        lambda: inputs(tokens),
        2 * dtype.itemsize * ELEMENTS,
    )


@contenders()
def bench_linear_cross_entropy(benchmark, contender):
    """The loss of 11 answers, one for each context of a WISE edit, and its gradient."""
    rows = 11

    def run(hidden, weight, targets):
        (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).sum(), hidden)
        return grad

    def inputs(vocabulary, width, seed=None):
        hidden = numbers((rows, width), 1.0, seed=seed).requires_grad_()
        weight = numbers((vocabulary, width), width**-0.5, seed=seed)
        return hidden, weight, torch.arange(rows)

    if contender == "pyeditfast":
        hidden, weight, targets = inputs(1000, 64, 1)
        exact = hidden.detach().double().requires_grad_()
        exact_grad = under("reference", run)(exact, weight.double(), targets)
        error = relative_error(under("cpp", run)(hidden, weight, targets), exact_grad)
        assert error <= 1e-6
        benchmark.extra_info["relative_error"] = error
    measure(
        benchmark,
        "loss of a head 4096→14336 and its gradient, 11 rows, float32",
        contender,
        {"torch": under("torch", run), "pyeditfast": under("cpp", run)},
        lambda: inputs(SHAPE[1], SHAPE[0]),
        4 * ELEMENTS,
    )
