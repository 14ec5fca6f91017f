"""Which backend cholesky_solve takes on a GPU for which ``make tune`` has measured them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyeditfast import Choice, backend, backends, chosen_backends
from pyeditfast.backends import explain
from pyeditfast.ops import compiled
from pyeditfast.ops.cholesky_solve import _candidates

CUDA = torch.device("cuda", 0)

GPU = "NVIDIA Test 1"

PAIRS = "float64, 2 to 4 items of 257 to 512 rows, 1024 columns or more"


@pytest.fixture
def trusted(tuned_folder, monkeypatch):
    """Let the CUDA form be compiled, and have run on a GPU; return the folder of the files."""
    module = SimpleNamespace(
        build_info=lambda: {"cuda": True, "cuda_emulated": False},
        cuda_cholesky_solve=None,
    )
    monkeypatch.setattr(compiled, "load_extension", lambda: module)
    monkeypatch.setattr(backends, "CUDA_RUN_ON_A_GPU", frozenset({"cholesky_solve"}))
    return tuned_folder


def write(folder: Path, **classes: str) -> Path:
    path = folder / "nvidia-test-1.json"
    entries = {name: {"backend": chosen} for name, chosen in classes.items()}
    content = {"gpu": GPU, "configurations": {}, "backends": {"cholesky_solve": entries}}
    path.write_text(json.dumps(content))
    return path


def choice(
    items: int = 2,
    n: int = 400,
    columns: int = 4096,
    dtype: torch.dtype = torch.float64,
    overwrite_gram: bool = False,
    requires_grad: bool = False,
) -> Choice:
    """Return what the op would take on the GPU; the inputs are on none."""
    gram = torch.empty(items, n, n, dtype=dtype, device="meta", requires_grad=requires_grad)
    rhs = torch.empty(items, n, columns, dtype=dtype, device="meta")
    return explain("cholesky_solve", _candidates(gram, rhs, overwrite_gram), CUDA)


def test_the_faster_one_is_taken_for_its_class_alone(trusted):
    write(trusted, **{PAIRS: "cuda"})
    assert choice() == Choice("cholesky_solve", "cuda", f"measured to be faster for {PAIRS}")
    assert choice(4, 257, 1024).backend == choice(3, 512, 14336).backend == "cuda"
    others = [
        {"items": 1},
        {"items": 5},
        {"n": 256},
        {"n": 513},
        {"columns": 1023},
        {"dtype": torch.float32},
    ]
    assert {choice(**other).backend for other in others} == {"torch"}


def test_leading_dimensions_are_multiplied(trusted):
    write(trusted, **{PAIRS: "cuda"})
    for shape, taken in (((2, 2), "cuda"), ((2, 3), "torch"), ((), "torch")):
        gram = torch.empty(*shape, 400, 400, dtype=torch.float64, device="meta")
        rhs = torch.empty(*shape, 400, 4096, dtype=torch.float64, device="meta")
        assert explain("op", _candidates(gram, rhs, False), CUDA).backend == taken


def test_torch_stays_where_it_is_faster(trusted):
    write(trusted, **{PAIRS: "torch"})
    reason = f"cuda not used: torch was measured to be as fast or faster for {PAIRS} on {GPU}"
    assert choice() == Choice("cholesky_solve", "torch", reason)


@pytest.mark.parametrize("with_file", [True, False])
def test_torch_stays_where_nothing_was_measured(trusted, with_file):
    if with_file:
        write(trusted, **{PAIRS.replace("64", "32"): "cuda"})
    reason = f"cuda not used: `make tune` has not measured {PAIRS} on {GPU}"
    assert choice() == Choice("cholesky_solve", "torch", reason)


def test_systems_larger_than_any_that_is_measured(trusted):
    write(trusted, **{PAIRS: "cuda"})
    assert choice(n=4097).backend == "torch"
    assert "2 to 4 items of over 4096 rows" in choice(n=4097).reason


def test_a_file_from_before_backends_were_measured(trusted):
    (trusted / "nvidia-test-1.json").write_text(json.dumps({"gpu": GPU, "configurations": {}}))
    assert choice().backend == "torch"


def test_a_measurement_does_not_make_up_for_a_check(trusted, monkeypatch):
    monkeypatch.setattr(backends, "CUDA_RUN_ON_A_GPU", frozenset())
    (trusted / "nvidia-test-1.json").write_text("not even read")
    reason = "cuda not used: no GPU has run this kernel yet"
    assert choice() == Choice("cholesky_solve", "torch", reason)


def test_whoever_asks_for_a_backend_gets_it(trusted):
    write(trusted, **{PAIRS: "torch"})
    with backend("cuda"):
        assert choice() == Choice("cholesky_solve", "cuda", "asked for")
    write(trusted, **{PAIRS: "cuda"})
    with backend("torch"):
        assert choice() == Choice("cholesky_solve", "torch", "asked for")


@pytest.mark.parametrize("refused", ["overwrite_gram", "requires_grad"])
def test_what_the_cuda_form_cannot_do_is_no_matter_of_speed(trusted, refused):
    write(trusted, **{PAIRS: "cuda"})
    assert choice(**{refused: True}).backend == "torch"


def test_without_sizes_the_choice_is_said_to_go_by_them(trusted):
    write(trusted, **{PAIRS: "cuda"})
    (found,) = [found for found in chosen_backends(CUDA) if found.op == "cholesky_solve"]
    reason = "it is taken at the sizes for which `make tune` measured it to be faster"
    assert found == Choice("cholesky_solve", "torch", f"cuda not used: {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"gpu": "NVIDIA Test 2"}', "\"gpu\" is 'NVIDIA Test 2', not 'NVIDIA Test 1'"),
        (
            json.dumps({"gpu": GPU, "configurations": {}, "backends": {"cholesky_solve": 1}}),
            "'cholesky_solve' is 1, not an object",
        ),
        (
            json.dumps(
                {
                    "gpu": GPU,
                    "configurations": {},
                    "backends": {"cholesky_solve": {PAIRS: {"config": "cuda"}}},
                }
            ),
            f'cholesky_solve, {PAIRS!r} has no name under "backend"',
        ),
        (
            json.dumps(
                {
                    "gpu": GPU,
                    "configurations": {},
                    "backends": {"cholesky_solve": {PAIRS: {"backend": "magma"}}},
                }
            ),
            f"it names the backend 'magma' for cholesky_solve, {PAIRS!r}; "
            "there are 'torch', 'cuda'",
        ),
    ],
)
def test_a_malformed_file_is_a_clear_error(trusted, text, reason):
    path = trusted / "nvidia-test-1.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        choice()
    assert str(path) in str(caught.value) and "make tune" in str(caught.value)


def test_the_files_are_read_without_triton():
    program = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "from pyeditfast.ops.measured_backend import not_measured_faster\n"
        "from pyeditfast_kernels import tuned_files\n"
        "tuned_files.gpu_name = lambda index: 'NVIDIA Test 1'\n"
        "device = torch.device('cuda', 0)\n"
        "print(not_measured_faster('op', 'cuda', 'a class', 'torch', device))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "`make tune` has not measured a class on NVIDIA Test 1"
