"""linear_cross_entropy: losses and gradients against float64, in every form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, lay_out, random_rows, same_bits
from tolerances import assert_as_accurate

from pyeditfast import reference
from pyeditfast.backends import backend, explain
from pyeditfast.extension import extension_status, load_extension
from pyeditfast.ops import linear_cross_entropy
from pyeditfast.ops.linear_cross_entropy import CANDIDATES

extension = load_extension()
needs_extension = pytest.mark.skipif(extension is None, reason=extension_status())
FORMS = ["torch", pytest.param("cpp", marks=needs_extension)]

# n, d, vocabulary: one of each, odd and prime, several parts of the vocabulary, more rows than are
# taken at once, columns beside the widest vectors.
SIZES = [
    (1, 1, 1),
    (1, 1, 2),
    (3, 5, 7),
    (11, 384, 3001),
    (16, 64, 512),
    (17, 67, 1031),
    (67, 33, 513),
    (130, 16, 100),
    (2, 700, 16411),
]


def case(n, d, vocabulary, dtype=torch.float32, scale=1.0):
    """Return hidden states, a head, targets and a bias."""
    hidden = random_rows(n, d, seed=1, dtype=dtype)
    weight = random_rows(vocabulary, d, seed=2, dtype=dtype, scale=scale / d**0.5)
    bias = random_rows(1, vocabulary, seed=3, dtype=dtype)[0]
    targets = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(4))
    return hidden, weight, targets, bias


def with_gradient(name, hidden, weight, targets, bias=None, weights=None):
    """Return losses and the gradient of their sum, or of their weighted sum."""
    hidden = hidden.detach().requires_grad_()
    with backend(name):
        losses = linear_cross_entropy(hidden, weight, targets, bias)
    total = losses.sum() if weights is None else (losses * weights).sum()
    (grad,) = torch.autograd.grad(total, hidden)
    return losses.detach(), grad


def exactly(hidden, weight, targets, bias=None, weights=None):
    double = (None if part is None else part.double() for part in (hidden, weight))
    bias = None if bias is None else bias.double()
    return with_gradient("reference", *double, targets, bias, weights)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_as_accurate_as_torch(form, sizes, biased):
    hidden, weight, targets, bias = case(*sizes)
    bias = bias if biased else None
    exact = exactly(hidden, weight, targets, bias)
    naive = with_gradient("torch", hidden, weight, targets, bias)
    found = with_gradient(form, hidden, weight, targets, bias)
    for result, plain, truth in zip(found, naive, exact, strict=True):
        assert_as_accurate(result, plain, truth, sizes[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    hidden, weight, targets, bias = case(5, 31, 101, dtype)
    losses, grad = with_gradient("torch", hidden, weight, targets, bias)
    exact, exact_grad = exactly(hidden, weight, targets, bias)
    assert (losses.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses.double(), exact, rtol=0, atol=0.05)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=0, atol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_follows_the_weight_of_each_loss(form):
    hidden, weight, targets, _ = case(19, 23, 301)
    weights = torch.linspace(-1, 2, 19)
    _, found = with_gradient(form, hidden, weight, targets, weights=weights)
    _, exact = exactly(hidden, weight, targets, weights=weights.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@needs_extension
def test_a_learned_row_keeps_its_digits():
    """One less a probability near 1 has lost them; the sum over the other tokens has not."""
    hidden, weight, targets, _ = case(9, 40, 997)
    weight[targets] += 0.5 * hidden
    losses, grad = with_gradient("cpp", hidden, weight, targets)
    exact, exact_grad = exactly(hidden, weight, targets)
    assert exact.max() < 1e-2
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=0)
    error = (grad.double() - exact_grad).norm(dim=-1) / exact_grad.norm(dim=-1)
    assert error.max() < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e3, 1e15])
@pytest.mark.parametrize("form", FORMS)
def test_tiny_and_huge_logits(form, scale):
    hidden, weight, targets, _ = case(7, 16, 1500, scale=scale)
    losses, grad = with_gradient(form, hidden, weight, targets)
    exact, exact_grad = exactly(hidden, weight, targets)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)
    # A softmax sees what rounding leaves of a logit's difference to the largest.
    assert grad.isfinite().all()
    if scale < 1:
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_a_bias_rules_out(form):
    hidden, weight, targets, bias = case(6, 8, 1100)
    bias[:600] = -torch.inf
    targets = targets % 500 + 600
    found = with_gradient(form, hidden, weight, targets, bias)
    expected = exactly(hidden, weight[600:], targets - 600, bias[600:])
    for result, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_finite_stays_alone(form, bad):
    hidden, weight, targets, _ = case(20, 24, 700)
    clean = with_gradient(form, hidden, weight, targets)
    hidden[7, 3] = bad
    for found, expected in zip(with_gradient(form, hidden, weight, targets), clean, strict=True):
        finite = found.isfinite() if found.ndim == 1 else found.isfinite().all(-1)
        assert (~finite).nonzero().flatten().tolist() == [7]
        assert torch.equal(found[finite], expected[finite])


@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_is_not_finite_spoils_every_row(form):
    hidden, weight, targets, _ = case(4, 8, 900)
    weight[500, 1] = torch.nan
    losses, grad = with_gradient(form, hidden, weight, targets)
    assert losses.isnan().all()
    assert grad.isnan().any(-1).all()


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_hidden_states(layout):
    hidden, weight, targets, bias = case(21, 37, 600)
    expected = with_gradient("cpp", hidden, weight, targets, bias)
    found = with_gradient("cpp", lay_out(hidden, layout)[0], weight, targets, bias)
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


@needs_extension
def test_heads_with_gaps_between_rows():
    hidden, weight, targets, bias = case(5, 37, 600)
    expected = with_gradient("cpp", hidden, weight, targets, bias)
    found = with_gradient("cpp", hidden, lay_out(weight, "inside")[0], targets, bias)
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"reads heads row by row; strides are \(1, 600\)"):
        with_gradient("cpp", hidden, lay_out(weight, "transposed")[0], targets, bias)


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_no_rows(form):
    hidden, weight, targets, bias = case(0, 7, 11)
    losses, grad = with_gradient(form, hidden, weight, targets, bias)
    assert (losses.shape, grad.shape) == ((0,), (0, 7))


@needs_extension
def test_thread_counts_give_the_same_bits():
    arguments = case(70, 96, 9000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(with_gradient("cpp", *arguments))
    finally:
        torch.set_num_threads(before)
    for losses, grad in results[1:]:
        assert same_bits(losses, results[0][0])
        assert same_bits(grad, results[0][1])


@needs_extension
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 1200), st.data())
def test_a_row_does_not_depend_on_its_neighbours(n, d, vocabulary, data):
    hidden, weight, targets, bias = case(n, d, vocabulary)
    losses, grad = with_gradient("cpp", hidden, weight, targets, bias)
    row = data.draw(st.integers(0, n - 1))
    alone = slice(row, row + 1)
    loss, its_grad = with_gradient("cpp", hidden[alone], weight, targets[alone], bias)
    assert same_bits(loss, losses[alone])
    assert same_bits(its_grad, grad[alone])


def test_gradients_of_the_torch_form():
    hidden, weight, targets, bias = case(3, 4, 5, torch.float64)
    with backend("torch"):
        assert torch.autograd.gradcheck(
            lambda x: linear_cross_entropy(x, weight, targets, bias), hidden.requires_grad_()
        )


@needs_extension
def test_it_is_differentiated_once():
    hidden, weight, targets, _ = case(3, 4, 5)
    hidden.requires_grad_()
    weights = torch.ones(3, requires_grad=True)
    with backend("cpp"):
        loss = (linear_cross_entropy(hidden, weight, targets) * weights).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_which_form_runs():
    fast = extension is not None and extension.linear_cross_entropy_is_fast()
    chosen = explain("linear_cross_entropy", CANDIDATES, torch.device("cpu")).backend
    assert chosen == ("cpp" if fast else "torch")
    hidden, weight, targets, bias = case(3, 4, 5, torch.float64)
    automatic = linear_cross_entropy(hidden, weight, targets, bias)
    torch.testing.assert_close(
        automatic, reference.linear_cross_entropy(hidden, weight, targets, bias)
    )


@needs_extension
def test_the_cpp_form_takes_float32_alone():
    with (
        backend("cpp"),
        pytest.raises(ValueError, match=r"takes float32, not torch\.bfloat16"),
    ):
        linear_cross_entropy(*case(3, 4, 5, torch.bfloat16)[:3])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.ones(3, 5)}, ValueError, r"hidden \(3, 5\) and weight \(7, 4\)"),
        ({"hidden": torch.ones(1, 3, 4)}, ValueError, r"hidden \(1, 3, 4\)"),
        ({"hidden": torch.ones(4)}, ValueError, r"hidden has shape \(4,\)"),
        ({"hidden": torch.ones(3, 4).double()}, TypeError, "float64 and weight torch.float32"),
        ({"hidden": torch.ones(3, 4).long()}, TypeError, "hidden has dtype torch.int64"),
        ({"targets": torch.tensor([0, 1])}, ValueError, r"targets have shape \(2,\)"),
        ({"targets": torch.tensor([0.0, 1, 2])}, TypeError, "targets are torch.float32"),
        ({"targets": torch.tensor([0, 7, 1])}, ValueError, "from 0 to 7; the vocabulary has 7"),
        ({"targets": torch.tensor([0, -100, 1])}, ValueError, "from -100 to 1"),
        ({"bias": torch.ones(6)}, ValueError, r"bias is torch.float32 \(6,\)"),
        ({"bias": torch.ones(7).double()}, ValueError, "bias is torch.float64"),
        ({"weight": torch.ones(7, 4, requires_grad=True)}, ValueError, "this op gives none"),
        ({"bias": torch.ones(7, requires_grad=True)}, ValueError, "this op gives none"),
    ],
)
def test_bad_arguments(changes, error, message):
    good = {
        "hidden": torch.ones(3, 4),
        "weight": torch.ones(7, 4),
        "targets": torch.tensor([0, 1, 6]),
        "bias": None,
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**good, **changes})


@needs_extension
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": -1}, "got -1 and 4"),
        ({"width": -4}, "got 3 and -4"),
        ({"vocabulary": -7}, "got -7 and 4"),
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"hidden": (0, 4, 1, 0)}, "hidden is a null pointer"),
        ({"weight": (64, -4, 1, 0)}, "weight has strides -4 and 1"),
        ({"weight": (64, 4, 2, 0)}, "element type 0 and column stride 2"),
        ({"weight": (64, 4, 1, 1)}, "element type 1 and column stride 1"),
        ({"targets": 0}, "targets is a null pointer, but there are 3 rows"),
        ({"losses": 0}, "losses is a null pointer"),
        ({"grads": 0}, "grads is a null pointer"),
        ({"vocabulary": 6}, r"targets\[2\] is 6; the vocabulary has 6 tokens"),
    ],
)
def test_the_compiled_function_refuses_bad_arguments(changes, message):
    hidden, weight, targets = torch.ones(3, 4), torch.ones(7, 4), torch.tensor([0, 1, 6])
    losses, grads = torch.ones(3), torch.ones(3, 4)
    arguments = {
        "hidden": (hidden.data_ptr(), 4, 1, extension.FLOAT32),
        "weight": (weight.data_ptr(), 4, 1, extension.FLOAT32),
        **{"bias": 0, "targets": targets.data_ptr(), "rows": 3, "width": 4, "vocabulary": 7},
        **{"losses": losses.data_ptr(), "grads": grads.data_ptr(), "threads": 2},
    }
    with pytest.raises(ValueError, match=message):
        extension.linear_cross_entropy(**{**arguments, **changes})
    assert (losses == 1).all()
    assert (grads == 1).all()
