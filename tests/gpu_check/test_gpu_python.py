"""Which Python runs the steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu.interpreter import candidates, choose, look_at

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def pretend(tmp_path):
    """Return a function that makes a program which answers as a Python with that torch would."""

    def pretend(name: str, **answer) -> str:
        path = tmp_path / name
        found = {"python": "3.12.1", "torch": None, "cuda": None, "gpu": None, **answer}
        path.write_text(f"#!/bin/sh\ncat <<'END'\nnoise\n{json.dumps(found)}\nEND\n")
        path.chmod(0o755)
        return str(path)

    return pretend


def test_the_environment_of_the_project_is_taken_if_it_has_cuda(pretend):
    inside = pretend("venv", torch="2.13.0", gpu="NVIDIA Test 1")
    outside = pretend("own", torch="2.11.0", gpu="NVIDIA Test 1")
    found, reason = choose([inside, outside])
    assert found is not None and found.path == inside
    assert reason == f"using {inside} (Python 3.12.1, torch 2.13.0, NVIDIA Test 1)"


def test_another_is_taken_if_it_has_none_and_the_reason_is_said(pretend):
    inside = pretend("venv", torch="2.13.0+cpu")
    outside = pretend("own", torch="2.11.0", gpu="NVIDIA Test 1")
    found, reason = choose([inside, outside])
    assert found is not None and found.path == outside
    assert reason.endswith(f"; not {inside}: torch 2.13.0+cpu sees no CUDA device")


def test_none_has_a_gpu(pretend, tmp_path):
    broken = pretend("broken", error="ModuleNotFoundError: No module named 'torch'")
    found, reason = choose([str(tmp_path / "missing"), broken, pretend("own", torch="2.13.0+cpu")])
    assert found is None and "\n" not in reason
    assert "missing: it does not run (FileNotFoundError)" in reason
    assert "no torch (ModuleNotFoundError: No module named 'torch')" in reason


def test_candidates(tmp_path):
    assert candidates(None, "/own") == ["/own"]
    assert candidates(tmp_path / "none", "/own") == ["/own"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert candidates(tmp_path, "/own") == [str(tmp_path / "bin" / "python"), "/own"]


def test_this_python():
    found = look_at(sys.executable)
    assert found.torch == str(torch.__version__) and found.problem is None
    assert (found.gpu is None) == (not torch.cuda.is_available())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("module", ["bench.gpu", "bench.gpu.tune"])
def test_a_machine_without_a_gpu_is_told_in_one_line(module):
    ran = subprocess.run(
        [sys.executable, "-m", module], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"{module}: no CUDA device for torch here ({sys.executable}")


def test_the_planner_needs_nothing_but_the_standard_library():
    program = (
        "import sys; import bench.gpu.__main__, bench.gpu.tune; "
        "print(sorted({'torch', 'numpy', 'triton', 'pyeditfast', 'pytest'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
