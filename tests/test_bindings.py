"""The compiled functions take addresses: they refuse what does not fit, and stay inside."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyeditfast.extension import extension_status, load_extension

extension = load_extension()
pytestmark = pytest.mark.skipif(extension is None, reason=extension_status())

ELEMENT_TYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
ROWS, COLUMNS, TOKENS = 3, 4, 5


def matrix(tensor, **changes):
    """Return a tensor as the functions take it, some of its figures replaced."""
    figures = {
        "address": tensor.data_ptr(),
        "row_stride": tensor.stride(0),
        "column_stride": tensor.stride(1),
        "type": getattr(extension, ELEMENT_TYPES[tensor.dtype]),
    }
    return tuple({**figures, **changes}.values())


class Call:
    """A valid call of each function on small tensors; arguments can be replaced."""

    def __init__(self, dtype=torch.float32):
        shape = (ROWS, COLUMNS)
        self.tensors = {
            name: torch.linspace(-1, 1, ROWS * COLUMNS).reshape(shape).to(dtype).clone()
            for name in ("weight", "grad", "main", "x", "base", "out", "side", "other")
        }
        self.tensors["side"] *= 2
        self.tensors["right"] = torch.ones(COLUMNS, TOKENS)
        self.tensors["left"] = torch.ones(ROWS, TOKENS)
        matrices = {name: matrix(tensor) for name, tensor in self.tensors.items()}
        sizes = {"rows": ROWS, "columns": COLUMNS, "threads": 2}
        self.arguments = {
            "masked_sgd": {
                **{name: matrices[name] for name in ("weight", "grad", "main")},
                **sizes,
                **{"seed": 5, "ratio": 0.5, "offset": 0},
                **{"lr": 0.1, "weight_decay": 0.1, "norm_constraint": 1.0},
            },
            "masked_sgd_product": {
                **{name: matrices[name] for name in ("weight", "main")},
                **{"output_grads": matrices["left"], "inputs": matrices["right"]},
                **sizes,
                **{"tokens": TOKENS, "seed": 5, "ratio": 0.5, "offset": 0},
                **{"lr": 0.1, "weight_decay": 0.1, "norm_constraint": 1.0},
            },
            "magnitude_threshold": {
                **{name: matrices[name] for name in ("x", "base")},
                **sizes,
                "k": 5,
            },
            "largest_magnitude": {"x": matrices["x"], **sizes},
            "ties_merge": {
                **{name: matrices[name] for name in ("out", "main")},
                **sizes,
                "sides": [matrices["side"], matrices["other"]],
                "thresholds": [0.1, 0.2],
                "weights": [0.5, 0.5],
            },
        }

    def __call__(self, function, **changes):
        arguments = {**self.arguments[function], **changes}
        return getattr(extension, function)(**arguments)

    def values(self):
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def changed(self, values):
        return [name for name in values if not torch.equal(values[name], self.tensors[name])]


MATRICES = {
    "masked_sgd": ("weight", "grad", "main"),
    "masked_sgd_product": ("weight", "main"),
    "magnitude_threshold": ("x", "base"),
    "largest_magnitude": ("x",),
    "ties_merge": ("out", "main"),
}
WRITTEN = {
    "masked_sgd": "weight",
    "masked_sgd_product": "weight",
    "magnitude_threshold": None,
    "largest_magnitude": None,
    "ties_merge": "out",
}
EVERY_MATRIX = [(function, name) for function, names in MATRICES.items() for name in names]


@pytest.mark.parametrize("function", MATRICES)
def test_the_valid_call_is_valid(function):
    call = Call()
    before = call.values()
    call(function)
    assert call.changed(before) == ([WRITTEN[function]] if WRITTEN[function] else [])


@pytest.mark.parametrize(("function", "name"), EVERY_MATRIX)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": 0}, "{name} is a null pointer, but has 3 x 4 elements"),
        ({"address": 1002}, "{name} is at 0x3ea, which is no multiple of 4"),
        ({"row_stride": -4}, r"{name} has strides -4 and 1; 0 or more is needed \(3 x 4\)"),
        ({"column_stride": -1}, "{name} has strides 4 and -1; 0 or more is needed"),
        (
            {"row_stride": 2**62},
            "{name} has strides 4611686018427387904 and 1, too large for 3 x 4",
        ),
        ({"type": 3}, "{name} has element type 3; 0 .float32., 1 .bfloat16. or 2 .float16."),
        ({"type": -1}, "{name} has element type -1"),
    ],
)
def test_bad_matrices(function, name, changes, message):
    call = Call()
    before = call.values()
    with pytest.raises(ValueError, match=message.format(name=name)):
        call(function, **{name: matrix(call.tensors[name], **changes)})
    assert call.changed(before) == []


@pytest.mark.parametrize("function", ["masked_sgd", "masked_sgd_product", "ties_merge"])
@pytest.mark.parametrize(
    "strides", [(0, 1), (1, 1), (3, 1), (4, 0), (0, 0), (1, 2), (2, 3), (1, 0)]
)
def test_written_elements_that_share_memory_or_interleave(function, strides):
    call = Call()
    before = call.values()
    name = WRITTEN[function]
    shared = matrix(call.tensors[name], row_stride=strides[0], column_stride=strides[1])
    message = (
        f"{name} has strides {strides[0]} and {strides[1]}: its 3 x 4 elements interleave or share"
    )
    with pytest.raises(ValueError, match=message):
        call(function, **{name: shared})
    assert call.changed(before) == []


@pytest.mark.parametrize("strides", [(1, 3), (4, 1), (5, 1), (8, 2), (1, 4)])
def test_written_elements_that_do_not(strides):
    call = Call()
    for function in ("masked_sgd", "masked_sgd_product", "ties_merge"):
        # Far from everything that is written.
        buffer = torch.full((32,), 7.0)
        out = (buffer.data_ptr(), *strides, extension.FLOAT32)
        call(function, **{WRITTEN[function]: out})
        written = torch.zeros(32, dtype=torch.bool)
        written.as_strided((ROWS, COLUMNS), strides).fill_(True)
        assert torch.equal(buffer != 7.0, written), function


@pytest.mark.parametrize("function", MATRICES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": -1}, "rows and columns must be >= 0 .*, got -1 and 4"),
        ({"columns": -5}, "got 3 and -5"),
        ({"rows": 2**40, "columns": 2**40}, "got 1099511627776 and 1099511627776"),
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"threads": -3}, "threads must be >= 1, got -3"),
    ],
)
def test_bad_sizes(function, changes, message):
    call = Call()
    before = call.values()
    with pytest.raises(ValueError, match=message):
        call(function, **changes)
    assert call.changed(before) == []


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        ("masked_sgd", {"ratio": 1.5}, r"ratio must be in \[0, 1\], got 1.5"),
        ("masked_sgd", {"ratio": math.nan}, r"ratio must be in \[0, 1\], got nan"),
        ("masked_sgd", {"offset": -1}, "got offset -1 for 3 x 4"),
        ("masked_sgd", {"offset": 2**63 - 5}, "got offset 9223372036854775803 for 3 x 4"),
        ("masked_sgd", {"norm_constraint": -1.0}, "norm_constraint must be >= 0, got -1"),
        ("masked_sgd", {"norm_constraint": math.nan}, "norm_constraint must be >= 0, got nan"),
        ("masked_sgd_product", {"ratio": 1.5}, r"ratio must be in \[0, 1\], got 1.5"),
        ("masked_sgd_product", {"offset": 2**63 - 5}, "got offset 9223372036854775803 for 3 x 4"),
        ("masked_sgd_product", {"tokens": -1}, "must be >= 0 .*, got 3 and -1"),
        ("magnitude_threshold", {"k": 0}, "k must be from 1 to .*, got 0 for 3 x 4"),
        ("magnitude_threshold", {"k": 13}, "got 13 for 3 x 4"),
        ("magnitude_threshold", {"k": -(2**63)}, "got -9223372036854775808 for 3 x 4"),
        ("magnitude_threshold", {"rows": 0}, "got 5 for 0 x 4"),
        ("ties_merge", {"thresholds": [0.1]}, "2 sides, but 1 thresholds and 2 weights"),
        ("ties_merge", {"weights": [0.1] * 3}, "2 sides, but 2 thresholds and 3 weights"),
        ("ties_merge", {"sides": [], "thresholds": [], "weights": []}, "got 0"),
    ],
)
def test_bad_numbers(function, changes, message):
    call = Call()
    before = call.values()
    with pytest.raises(ValueError, match=message):
        call(function, **changes)
    assert call.changed(before) == []


@pytest.mark.parametrize(
    ("name", "tensor", "count"), [("output_grads", "left", 3), ("inputs", "right", 4)]
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": 0}, "{name} is a null pointer, but has {count} x 5 elements"),
        ({"row_stride": -5}, "{name} has strides -5 and 1; 0 or more is needed"),
        ({"column_stride": 2}, "{name} has element type 0 and column stride 2; 0 .float32. and 1"),
        ({"type": 1}, "{name} has element type 1 and column stride 1"),
        ({"type": 7}, "{name} has element type 7; 0 .float32., 1 .bfloat16. or 2 .float16."),
    ],
)
def test_bad_vectors(name, tensor, count, changes, message):
    call = Call()
    before = call.values()
    with pytest.raises(ValueError, match=message.format(name=name, count=count)):
        call("masked_sgd_product", **{name: matrix(call.tensors[tensor], **changes)})
    assert call.changed(before) == []


def test_a_bad_side_is_named():
    call = Call()
    sides = [matrix(call.tensors["side"]), matrix(call.tensors["other"], address=0)]
    with pytest.raises(ValueError, match=r"sides\[1\] is a null pointer"):
        call("ties_merge", sides=sides)


@pytest.mark.parametrize("function", ["masked_sgd", "ties_merge"])
@pytest.mark.parametrize("sizes", [(0, 4), (3, 0), (0, 0), (0, 2**59), (2**59, 0)])
def test_no_elements_need_no_address(function, sizes):
    call = Call()
    before = call.values()
    nothing = (0, 2**62, 2**62, extension.FLOAT32)
    changes = {name: nothing for name in MATRICES[function]}
    if function == "ties_merge":
        changes["sides"] = [nothing, nothing]
    call(function, rows=sizes[0], columns=sizes[1], **changes)
    assert call.changed(before) == []


@pytest.mark.parametrize("function", MATRICES)
@pytest.mark.parametrize("value", [None, "3", 1.5, 2**64, [object()]])
def test_wrong_types_are_refused(function, value):
    call = Call()
    before = call.values()
    for name in call.arguments[function]:
        may_be_none = (function, name) in (
            *((step, "main") for step in ("masked_sgd", "masked_sgd_product")),
            ("magnitude_threshold", "base"),
        )
        is_number = isinstance(value, (int, float)) and name in (
            *("ratio", "lr", "weight_decay", "norm_constraint"),
        )
        if is_number or (value is None and may_be_none):
            continue
        with pytest.raises(TypeError):
            call(function, **{name: value})
    assert call.changed(before) == []


SIZES = st.integers(min_value=0, max_value=40)
STRIDES = st.integers(min_value=0, max_value=90)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), rows=SIZES, columns=SIZES, threads=st.integers(min_value=1, max_value=4))
def test_any_sizes_and_strides_leave_the_rest_of_memory_alone(data, rows, columns, threads):
    """Random matrices inside one buffer each: what lies between their elements stays as it was."""
    dtypes = list(ELEMENT_TYPES)

    def draw_matrix():
        dtype = data.draw(st.sampled_from(dtypes))
        strides = data.draw(STRIDES), data.draw(STRIDES)
        first = data.draw(st.integers(min_value=0, max_value=7))
        length = first + max(rows - 1, 0) * strides[0] + max(columns - 1, 0) * strides[1] + 9
        buffer = torch.full((length,), 7.0, dtype=dtype)
        view = torch.as_strided(buffer, (rows, columns), strides, first)
        return buffer, view, matrix(view, address=buffer[first:].data_ptr())

    buffer, view, written = draw_matrix()
    _, grad, grad_matrix = draw_matrix()
    _, main, main_matrix = draw_matrix()
    mask = torch.zeros_like(buffer, dtype=torch.bool)
    mask.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    elements = itertools.product(range(rows), range(columns))
    places = [row * view.stride(0) + column * view.stride(1) for row, column in elements]
    try:
        extension.masked_sgd(
            weight=written,
            grad=grad_matrix,
            main=main_matrix,
            rows=rows,
            columns=columns,
            seed=0,
            ratio=1.0,
            offset=0,
            lr=0.5,
            weight_decay=0.0,
            norm_constraint=100.0,
            threads=threads,
        )
    except ValueError as error:
        assert "share memory" in str(error)
        assert (buffer == 7.0).all()
        return
    assert len(set(places)) == len(places)
    assert (buffer[~mask] == 7.0).all()
    assert (buffer[mask] == 3.5).all()

    # Side memories of 3.5 on a main memory of 7.
    extension.ties_merge(
        out=written,
        main=main_matrix,
        sides=[grad_matrix, grad_matrix],
        thresholds=[0.0, 0.0],
        weights=[0.5, 0.5],
        rows=rows,
        columns=columns,
        threads=threads,
    )
    assert (buffer == 7.0).all()
    if rows * columns:
        grad.fill_(3.5)
        found = extension.magnitude_threshold(
            x=grad_matrix, base=main_matrix, rows=rows, columns=columns, k=1, threads=threads
        )
        assert found == 3.5
        assert (main == 7.0).all()
    largest = extension.largest_magnitude(
        x=grad_matrix, rows=rows, columns=columns, threads=threads
    )
    assert largest == (3.5 if rows * columns else 0.0)
