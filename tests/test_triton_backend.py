"""When the Triton kernels are taken, and when not."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from pyeditfast import Choice, backend, backends
from pyeditfast.backends import Candidate, always, explain, fitting, triton_candidate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

CANDIDATES = (triton_candidate("gram"), Candidate("torch", always))

NEEDS = "it needs a CUDA device, or TRITON_INTERPRET=1 set before triton is imported"


@pytest.fixture(autouse=True)
def installed_and_not_interpreting(monkeypatch):
    monkeypatch.setattr(backends, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(backends, "_interprets", lambda: False)


def test_auto_waits_for_a_gpu_to_have_run_the_kernel(monkeypatch):
    reason = "triton not used: no GPU has run this kernel yet"
    assert explain("gram", CANDIDATES, CUDA) == Choice("gram", "torch", reason)
    monkeypatch.setattr(backends, "RUN_ON_A_GPU", frozenset({"covariance"}))
    assert explain("gram", CANDIDATES, CUDA).backend == "torch"
    monkeypatch.setattr(backends, "RUN_ON_A_GPU", frozenset({"gram"}))
    assert explain("gram", CANDIDATES, CUDA) == Choice("gram", "triton", "first choice on cuda")
    assert explain("gram", CANDIDATES, CPU).backend == "torch"


def test_the_kernels_may_be_asked_for():
    with backend("triton"):
        assert explain("gram", CANDIDATES, CUDA) == Choice("gram", "triton", "asked for")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    assert explain("gram", CANDIDATES, CPU) == Choice("gram", "torch", f"triton not used: {NEEDS}")
    message = f"gram has no usable backend 'triton' on cpu (triton not used: {NEEDS})"
    with backend("triton"), pytest.raises(ValueError, match=re.escape(message)):
        explain("gram", CANDIDATES, CPU)
    monkeypatch.setattr(backends, "_interprets", lambda: True)
    with backend("triton"):
        assert explain("gram", CANDIDATES, CPU) == Choice("gram", "triton", "asked for")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_interpreter_is_never_automatic(monkeypatch, device):
    monkeypatch.setattr(backends, "_interprets", lambda: True)
    monkeypatch.setattr(backends, "RUN_ON_A_GPU", frozenset({"gram"}))
    reason = "triton not used: Triton's interpreter is for tests"
    assert explain("gram", CANDIDATES, device) == Choice("gram", "torch", reason)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_without_triton(monkeypatch, device):
    monkeypatch.setattr(backends, "_triton_is_installed", lambda: False)
    reason = "triton not used: triton is not installed; pip install triton"
    assert explain("gram", CANDIDATES, device) == Choice("gram", "torch", reason)


def test_other_devices():
    reason = "triton not used: it runs on CUDA devices, not on meta"
    assert explain("gram", CANDIDATES, torch.device("meta")) == Choice("gram", "torch", reason)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_the_kernels_do_not_take(monkeypatch, dtype):
    monkeypatch.setattr(backends, "RUN_ON_A_GPU", frozenset({"gram"}))
    candidates = fitting(CANDIDATES, torch.float32, dtype)
    reason = f"triton not used: its kernels take bfloat16, float16 and float32, not {dtype}"
    assert explain("gram", candidates, CUDA) == Choice("gram", "torch", reason)
    with backend("triton"), pytest.raises(ValueError, match=re.escape(reason)):
        explain("gram", candidates, CUDA)


def test_dtypes_that_the_kernels_take():
    assert fitting(CANDIDATES, torch.bfloat16, torch.float16, torch.float32) is CANDIDATES


@pytest.mark.parametrize(
    ("variable", "imported", "expected"),
    [
        ("1", "after", "asked for"),
        ("1", "before", "asked for"),
        ("0", "after", "refused"),
        ("1", "before it was set", "refused"),
    ],
)
def test_the_variable_counts_when_triton_is_imported(variable, imported, expected):
    pytest.importorskip("triton")
    lines = {
        "before": [f"os.environ['TRITON_INTERPRET'] = '{variable}'", "import triton.language"],
        "before it was set": [
            "import triton.language",
            f"os.environ['TRITON_INTERPRET'] = '{variable}'",
        ],
        "after": [f"os.environ['TRITON_INTERPRET'] = '{variable}'"],
    }[imported]
    program = [
        "import os, sys",
        "os.environ.pop('TRITON_INTERPRET', None)",
        *lines,
        "import pyeditfast, pyeditfast.ops",
        "from pyeditfast.backends import explain, triton_candidate",
        "import torch",
        "assert 'pyeditfast_kernels' not in sys.modules",
        "with pyeditfast.backend('triton'):",
        "    try: print(explain('gram', [triton_candidate('gram')], torch.device('cpu')).reason)",
        "    except ValueError: print('refused')",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == expected
