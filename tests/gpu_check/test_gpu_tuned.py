"""Configurations that were tuned: written, read, chosen, and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.gpu.candidates import best
from bench.gpu.fastest_backend import size_classes
from bench.gpu.process import Outcome
from bench.gpu.tune import content_of, measured_ops, phases, tunable_ops
from pyeditfast_kernels import apply_shift, covariance, edit_values, gram, tuned_files

REPOSITORY = Path(__file__).resolve().parents[2]

GPU = "NVIDIA Test 1"
CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16


def write(tuned_folder: Path, configurations: object, gpu: str = GPU) -> Path:
    path = tuned_folder / "nvidia-test-1.json"
    path.write_text(json.dumps({"gpu": gpu, "configurations": configurations}))
    return path


def test_without_a_file_the_defaults_are_taken(tuned_folder):
    assert gram.choose_config(400, BF16, True, CUDA) is gram.SMALL
    assert covariance.choose_config(4096, BF16, True, CUDA) is covariance.LARGE
    assert apply_shift.choose_config(BF16, True, BF16, "nearest", CUDA) is apply_shift.SQUARE


def test_the_tuned_one_is_taken_for_its_class_alone(tuned_folder):
    write(tuned_folder, {"gram": {"bfloat16, few rows": {"config": "64 × 64, 128 deep"}}})
    assert gram.choose_config(400, BF16, True, CUDA) is gram.DEEP
    assert gram.choose_config(400, BF16, True) is gram.SMALL
    assert gram.choose_config(400, BF16, True, torch.device("meta")) is gram.SMALL
    assert gram.choose_config(400, BF16, True, torch.device("cpu")) is gram.SMALL
    assert gram.choose_config(400, BF16, False, CUDA) is gram.FINE
    assert gram.choose_config(513, BF16, True, CUDA) is gram.LARGE
    assert gram.choose_config(400, torch.float16, True, CUDA) is gram.SMALL
    assert gram.choose_config(400, torch.float32, True, CUDA) is gram.FINE
    assert covariance.choose_config(4096, BF16, True, CUDA) is covariance.LARGE


def test_every_launcher_asks(tuned_folder):
    write(
        tuned_folder,
        {
            "gram": {"float32, many rows": {"config": "64 × 64, 32 deep, 8 warps"}},
            "covariance": {"bfloat16, many features": {"config": "64 × 64"}},
            "apply_shift": {
                "bfloat16 weight, float32 keys, nearest": {"config": "64 × 128, 4 warps"}
            },
        },
    )
    assert gram.choose_config(513, torch.float32, True, CUDA) is gram.FINE_WIDE
    assert covariance.choose_config(1025, BF16, True, CUDA) is covariance.SMALL
    chosen = apply_shift.choose_config(torch.float32, True, BF16, "nearest", CUDA)
    assert chosen is apply_shift.WIDE
    for weight, rounding in ((torch.float16, "nearest"), (BF16, "stochastic")):
        chosen = apply_shift.choose_config(torch.float32, True, weight, rounding, CUDA)
        assert chosen is apply_shift.NARROW


def test_a_launch_on_meta_tensors_takes_the_default(tuned_folder):
    """What is compiled ahead of time must not depend on the machine that compiles."""
    from pyeditfast_kernels.launch import recording

    few = {"bfloat16, few rows": {"config": "one row, 4 warps"}}
    write(
        tuned_folder, {"edit_values": few, "running_moments": {"bfloat16": {"config": "nonsense"}}}
    )
    rows = torch.empty(4, 48, dtype=BF16, device="meta")
    moments = torch.empty(96, device="meta")
    with recording() as launches:
        edit_values.edit_values(rows, rows, moments, moments, 1.0, rows)
    assert launches[0].config is edit_values.ONE_ROW


def test_the_file_is_read_once(tuned_folder):
    path = write(tuned_folder, {"gram": {"bfloat16, few rows": {"config": "128 × 128"}}})
    assert gram.choose_config(1, BF16, True, CUDA) is gram.LARGE
    path.write_text("garbage")
    assert gram.choose_config(1, BF16, True, CUDA) is gram.LARGE


FEW = "bfloat16, few rows"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "\"gpu\" is 'list', not 'NVIDIA Test 1'"),
        ('{"gpu": "NVIDIA Test 2"}', "\"gpu\" is 'NVIDIA Test 2', not 'NVIDIA Test 1'"),
        ('{"gpu": "NVIDIA Test 1"}', "'configurations' is None, not an object"),
        ('{"gpu": "NVIDIA Test 1", "configurations": {"gram": 3}}', "'gram' is 3, not an object"),
        (
            '{"gpu": "NVIDIA Test 1", "configurations": {"gram": {"x": {"name": "y"}}}}',
            "gram, 'x' has no name under \"config\"",
        ),
        (
            '{"gpu": "NVIDIA Test 1", "configurations": {}, "backends": []}',
            "'backends' is [], not an object",
        ),
        (
            json.dumps({"gpu": GPU, "configurations": {}, "backends": {"op": {"x": {}}}}),
            "op, 'x' has no name under \"backend\"",
        ),
        (
            json.dumps({"gpu": GPU, "configurations": {"gram": {FEW: {"config": "7 × 7"}}}}),
            "names the configuration '7 × 7' for gram, 'bfloat16, few rows'; there are '64 × 64', "
            "'64 × 64, 128 deep', '128 × 128' (run `make tune` again, or delete the file)",
        ),
    ],
)
def test_a_malformed_file_is_a_clear_error(tuned_folder, text, reason):
    path = tuned_folder / "nvidia-test-1.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        gram.choose_config(400, BF16, True, CUDA)
    assert reason in str(caught.value) and str(path) in str(caught.value)
    assert "make tune" in str(caught.value)


def test_importing_reads_nothing():
    program = (
        "import builtins, pathlib, torch\n"
        "read = pathlib.Path.read_text\n"
        "def fail(self, *a, **k):\n"
        "    assert 'tuned_configs' not in str(self), self\n"
        "    return read(self, *a, **k)\n"
        "pathlib.Path.read_text = fail\n"
        "import pyeditfast_kernels.gram, pyeditfast.ops\n"
        "from pyeditfast_kernels import tuned_files\n"
        "assert tuned_files.read_tuned_file.cache_info().currsize == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


IN_THE_CHECKOUT = sorted(tuned_files.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", IN_THE_CHECKOUT, ids=lambda path: path.name)
def test_every_file_in_the_checkout_can_be_used(path):
    """Passes over no file: there is none before a GPU has been tuned for."""
    import importlib

    content = json.loads(path.read_text())
    assert tuned_files.path_of(content["gpu"]) == path
    found = tuned_files.read_tuned_file(content["gpu"])
    for (op, shape_class), name in found.configurations.items():
        candidates = importlib.import_module(f"pyeditfast_kernels.{op}").CANDIDATES
        assert name in [config.name for config in candidates[shape_class]]
    for (op, size_class), name in found.backends.items():
        assert size_class in [case.name for case in size_classes(op, "full")]
        candidates = importlib.import_module(f"pyeditfast.ops.{op}").CANDIDATES
        assert name in [candidate.backend for candidate in candidates]


# Tuning.


def test_every_kernel_that_can_be_tuned_is():
    assert {"gram", "covariance", "apply_shift", "edit_values", "running_moments"} <= set(
        tunable_ops()
    )


@pytest.mark.parametrize("op", ["apply_shift", "covariance", "edit_values", "gram"])
def test_choices_are_those_that_the_launcher_makes(op, tuned_folder):
    import importlib

    module = importlib.import_module(f"pyeditfast_kernels.{op}")
    assert {choice.shape_class for choice in module.tunable()} == set(module.CANDIDATES)
    for choice in module.tunable():
        assert choice.op == op and choice.candidates == module.CANDIDATES[choice.shape_class]
        names = [config.name for config in choice.candidates]
        assert 2 <= len(set(names)) == len(names) <= 4
        # The first candidate is what the launcher takes by itself for these inputs.
        from pyeditfast_kernels.launch import recording

        inputs = choice.inputs(torch.device("meta"), False)
        with recording() as launches:
            call_without_config(op, module, inputs)
        assert launches[0].config is choice.candidates[0]


def call_without_config(op, module, inputs):
    if op == "gram":
        module.gram(inputs[0], 1.0)
    elif op == "covariance":
        module.covariance(*inputs)
    elif op == "apply_shift":
        module.apply_shift_(*inputs, "nearest")
    else:
        module.edit_values(*inputs, 1e-6, inputs[1])


def test_kernels_that_write_in_place_say_so():
    for module, place in ((apply_shift, 0), (covariance, 1), (gram, None), (edit_values, None)):
        assert {choice.writes for choice in module.tunable()} == {place}


CHECK_ALL = """
import importlib, sys, torch
torch.set_num_threads(1)
torch.manual_seed(0)
from bench.gpu.candidates import CandidateError, check
from bench.gpu.tune import tunable_ops
for op in tunable_ops():
    for choice in importlib.import_module(f"pyeditfast_kernels.{op}").tunable():
        check(choice, torch.device("cpu"), True)
        print(choice.op, len(choice.candidates))

import dataclasses
gram = importlib.import_module("pyeditfast_kernels.gram").tunable()[0]
wrong = lambda inputs, config: gram.call(inputs, config) * (1 + 1e-4 * (config.num_stages == 3))
try:
    check(dataclasses.replace(gram, call=wrong), torch.device("cpu"), True)
except CandidateError as error:
    print(error)
"""


@pytest.mark.slow
def test_every_candidate_gives_the_right_result(environment, interpreter):
    ran = subprocess.run(
        [sys.executable, "-c", CHECK_ALL],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    *lines, last = ran.stdout.splitlines()
    assert len(lines) >= 12
    assert last.startswith("64 × 64, 128 deep: error 0.0001, allowed ")


@pytest.mark.parametrize(
    ("medians", "chosen"),
    [
        ({"a": 1.0, "b": 0.97, "c": 0.98}, "b"),
        ({"a": 1.0, "b": 0.985}, "a"),
        ({"a": 1.0, "b": 2.0}, "a"),
    ],
)
def test_the_default_stays_unless_another_is_clearly_faster(medians, chosen):
    assert best("a", medians) == chosen


def test_an_op_that_failed_keeps_what_was_known(device_row):
    found = {
        "kind": "tuned",
        "op": "gram",
        "shape_class": "x",
        "config": "new",
        "median_seconds": {"new": 1.0},
    }
    outcomes = [
        Outcome("device", "passed", 1.0, "", [device_row]),
        Outcome("tune gram", "passed", 1.0, "", [found]),
        Outcome("tune covariance", "failed", 1.0, "", [{**found, "op": "covariance"}]),
    ]
    known = {"gram": {"x": {"config": "old"}}, "covariance": {"x": {"config": "old"}}}
    for gpu, kept in ((GPU, "old"), ("NVIDIA Test 2", None)):
        content = content_of(outcomes, {"gpu": gpu, "configurations": known})
        assert content["gpu"] == GPU and content["versions"] == {"torch": "2"}
        assert content["configurations"]["gram"]["x"]["config"] == "new"
        entry = content["configurations"].get("covariance", {"x": {"config": None}})
        assert entry["x"]["config"] == kept


def fastest(size_class: str, backend: str, op: str = "cholesky_solve") -> dict[str, object]:
    return {
        "kind": "fastest",
        "op": op,
        "size_class": size_class,
        "backend": backend,
        "median_seconds": {backend: 1.0},
    }


FAILED = {"kind": "check", "status": "failed"}


@pytest.mark.parametrize(
    ("status", "rows", "kept"),
    [
        ("passed", [fastest("x", "cuda")], {"x": "cuda"}),
        ("cut off", [fastest("x", "cuda")], {"x": "cuda", "y": "torch"}),
        ("cut off", [fastest("x", "cuda"), FAILED], {"x": "torch", "y": "torch"}),
        ("failed", [fastest("x", "cuda"), FAILED], {"x": "torch", "y": "torch"}),
        ("not available", [], {"x": "torch", "y": "torch"}),
    ],
)
def test_what_is_kept_of_a_step_that_measures_backends(device_row, status, rows, kept):
    outcomes = [
        Outcome("device", "passed", 1.0, "", [device_row]),
        Outcome("backends of cholesky_solve", status, 1.0, "", rows),
    ]
    old = {name: {"backend": "torch"} for name in ("x", "y")}
    before = {
        "gpu": GPU,
        "configurations": {"gram": {"x": {"config": "old"}}},
        "backends": {"cholesky_solve": old, "other": old},
    }
    content = content_of(outcomes, before)
    found = content["backends"]["cholesky_solve"]
    assert {name: entry["backend"] for name, entry in found.items()} == kept
    assert content["backends"]["other"] == old
    assert content["configurations"] == before["configurations"]


def test_the_compiled_module_is_built_before_its_backends_are_measured():
    assert measured_ops() == ["cholesky_solve"]
    names = [
        [step.name for step in phase.steps]
        for phase in phases(["gram", "cholesky_solve"], "cuda", "full")
    ]
    assert names == [["device"], ["build csrc"], ["tune gram", "backends of cholesky_solve"]]
    assert [phase.name for phase in phases(["gram"], "cuda", "full")] == ["look", "tune"]


def test_every_class_of_sizes_is_measured_once():
    from pyeditfast.ops.cholesky_size_class import LARGEST_ITEMS, LARGEST_ROWS, size_class

    items = [*LARGEST_ITEMS, LARGEST_ITEMS[-1] + 1]
    classes = {
        size_class(number, n, 4096, dtype)
        for number in items
        for n in LARGEST_ROWS
        for dtype in (torch.float32, torch.float64)
    }
    found = size_classes("cholesky_solve", "full")
    assert len(found) == len(classes) == 56 and {case.name for case in found} == classes
    # Where a class does not fit the memory it is left out; on 24 GB none should be.
    assert max(case.memory for case in found) < 0.9 * 24e9
