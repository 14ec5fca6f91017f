"""The cases: what they check, on the CPU in Triton's interpreter, and that they can fail."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time

import pytest
import torch
from ops.tolerances import largest_error

from bench.gpu import rows
from bench.gpu.case import AUTO, Case, cases, own, using
from bench.gpu.compare import largest_errors, relative_error, same_bits
from bench.gpu.correctness import check_backend, check_case
from bench.gpu.lost_device import is_fatal
from bench.gpu.options import selected
from bench.gpu.plan import OPS, SIZES
from bench.gpu.process import Step, run_step

CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_op_is_right_in_every_backend(tmp_path, environment, interpreter):
    """What ``make gpu`` does first, at tiny size."""
    options = ("--device", "cpu", "--size", "tiny", "--ops", ",".join(OPS))
    step = Step("correctness", ("-m", "bench.gpu.correctness", *options), 250.0, True)
    outcome = run_step(step, sys.executable, environment, tmp_path, time.monotonic() + 250)
    failed = [row for row in outcome.rows if row.get("status") == "failed"]
    assert failed == [] and outcome.status == "passed", outcome.detail
    passed = {
        (row["op"], row["backend"])
        for row in outcome.rows
        if row["kind"] == "check" and row["status"] == "passed"
    }
    assert {op for op, _ in passed} == set(OPS)
    assert {("gram", "triton"), ("apply_shift", "triton"), ("masked_sgd", "triton")} <= passed


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_cases_are_complete(op, size):
    found = cases(op, size)
    assert any(case.timed for case in found) and any(case.checked for case in found)
    every = importlib.import_module(f"bench.gpu.cases.{op}").cases(size)
    timed = {case.name for case in every if case.timed}
    assert {case.name for case in found if case.timed} == timed
    for case in found:
        assert case.op == op and case.unit in ("bf16", "fp32", "fp64")
        assert case.exact is not None and (case.plain or case.equal)
        assert not case.timed or case.flops + case.bytes > 0


@pytest.mark.parametrize("op", OPS)
def test_every_form_computes_the_same(op):
    """Also the forms that are only timed; what is called published may differ by rounding."""
    for case in cases(op, "tiny"):
        if not case.timed or op == "random_mask":
            continue
        inputs = case.inputs(CPU, torch.Generator().manual_seed(3))
        exact = case.exact(own(case, inputs))
        others = {**case.plain, **case.less_exact, "published": case.published}
        for name, form in others.items():
            if form is None or name.startswith("16-bit product to"):
                continue
            if name == "published" and op in NOT_COMPARABLE:
                continue
            found = form(own(case, inputs))
            for output in set(found) & set(exact):
                error = relative_error(found[output].reshape(exact[output].shape), exact[output])
                assert error <= 0.05, (name, output)


NOT_COMPARABLE = {
    # One decision for the whole call, gaps of the batch's mean, the variance of micro-batches, a
    # trim that keeps fewer of equal magnitudes.
    "routed_linear",
    "activation_gap",
    "running_moments",
    "ties_merge",
}


def test_inputs_that_are_written_are_copied():
    (case,) = [case for case in cases("masked_sgd", "tiny") if case.name.startswith("step, active")]
    inputs = case.inputs(CPU, torch.Generator().manual_seed(0))
    copied = own(case, inputs)
    assert copied["weight"] is not inputs["weight"] and copied["main"] is inputs["main"]


# Checks that fail.


def doubling(**changes) -> Case:
    """Return a case whose op doubles x."""
    case = Case(
        op="gram",
        name="twice",
        inputs=lambda device, generator: {"x": torch.arange(1.0, 5.0)},
        run=lambda inputs: {"y": 2 * inputs["x"]},
        exact=lambda inputs: {"y": 2 * inputs["x"].double()},
        plain={"sum": lambda inputs: {"y": inputs["x"] + inputs["x"]}},
        backends=("torch",),
    )
    return dataclasses.replace(case, **changes)


def found_in(path) -> dict[str, tuple[str, str]]:
    found, problems = rows.read(path)
    assert problems == []
    return {row["what"]: (row["status"], row["detail"]) for row in found}


def run_check(case: Case) -> None:
    check_case(case, CPU, None, set())


def test_a_right_case(rows_file):
    run_check(doubling())
    found = found_in(rows_file)
    assert {what: status for what, (status, _) in found.items()} == {
        "y is right": "passed",
        "same bits twice": "passed",
    }


@pytest.mark.parametrize(
    "wrong",
    [
        lambda inputs: {"y": 2.001 * inputs["x"]},
        lambda inputs: {"y": torch.full((4,), float("nan"))},
        lambda inputs: {"y": torch.full((4,), float("inf"))},
    ],
    ids=["off", "nan", "inf"],
)
def test_a_wrong_result(rows_file, wrong):
    run_check(doubling(run=wrong))
    assert found_in(rows_file)["y is right"][0] == "failed"


def test_a_result_that_varies(rows_file):
    number = iter(range(10))
    run_check(doubling(run=lambda inputs: {"y": 2 * inputs["x"] + 4e-7 * next(number)}))
    found = found_in(rows_file)
    assert found["y is right"][0] == "passed" and found["same bits twice"][0] == "failed"


def test_a_result_of_another_shape_or_name(rows_file):
    run_check(doubling(run=lambda inputs: {"y": torch.ones(3)}))
    assert found_in(rows_file)["runs"] == ("failed", "AssertionError: y is (3,), not (4,)")
    run_check(doubling(run=lambda inputs: {"z": torch.ones(4)}))
    assert "outputs ['z']" in found_in(rows_file)["runs"][1]


def test_an_op_that_raises_and_one_that_is_not_there(rows_file):
    def raises(inputs):
        raise ValueError("no such thing")

    def lacks(inputs):
        raise ModuleNotFoundError("No module named 'pyeditfast_kernels.other'")

    run_check(doubling(run=raises))
    assert found_in(rows_file)["runs"] == ("failed", "ValueError: no such thing")
    run_check(doubling(run=lacks))
    assert found_in(rows_file)["runs"][0] == "not available"


def test_equality_allows_nothing(rows_file):
    slightly = {"run": lambda inputs: {"y": torch.nextafter(2 * inputs["x"], torch.tensor(9.0))}}
    with using("torch"):
        case = doubling(**slightly)
        inputs = case.inputs(CPU, torch.Generator())
        exact = case.exact(inputs)
        check_backend(case, "torch", inputs, exact, {"y": 0.0})
        assert found_in(rows_file)["y is right"][0] == "passed"
        check_backend(dataclasses.replace(case, equal=True), "torch", inputs, exact, {})
        assert found_in(rows_file)["y is right"][0] == "failed"


def test_whole_numbers_have_to_be_met():
    truth = {"route": torch.tensor([1, -1])}
    assert [error for _, error, _ in largest_errors(truth, truth)] == [0.0]
    other = {"route": torch.tensor([1, 0])}
    assert [error for _, error, _ in largest_errors(other, truth)] == [1.0]


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 4, 3), (2, 0, 3)], ids=str)
def test_the_error_is_that_of_the_test_suite(shape):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(shape, generator=generator, dtype=torch.float64)
    result = (exact + 1e-3 * torch.randn(shape, generator=generator)).float()
    assert relative_error(result, exact) == largest_error(result, exact)


def test_bits_and_not_values_are_compared():
    nan = {"y": torch.tensor([float("nan"), 0.0])}
    assert same_bits(nan, {"y": nan["y"].clone()})
    assert not same_bits({"y": torch.tensor([0.0])}, {"y": torch.tensor([-0.0])})


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA out of memory. Tried to allocate 20 GiB. CUDA error", False),
        ("n is 3", False),
    ],
)
def test_errors_after_which_a_process_is_lost(text, fatal):
    assert is_fatal(RuntimeError(text)) is fatal


def test_going_on_behind_a_case():
    found = [doubling(name=name) for name in ("a", "b", "c")]
    assert [case.name for case in selected(found, None)] == ["a", "b", "c"]
    assert [case.name for case in selected(found, "gram: b")] == ["c"]
    with pytest.raises(SystemExit, match="names no case"):
        selected(found, "gram: d")


def test_auto_takes_every_kernel_only_inside():
    from pyeditfast import backends

    before = backends.RUN_ON_A_GPU
    with using(AUTO):
        assert {"gram", "apply_shift", "masked_sgd"} <= backends.RUN_ON_A_GPU
    assert backends.RUN_ON_A_GPU is before
