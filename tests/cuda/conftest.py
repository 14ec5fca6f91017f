"""The CUDA kernels of ``csrc`` on the CPU: the threads of a block as fibers, every access to shared
memory checked (``tests/csrc/block_executor.h``).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import emulated
import pytest
import torch

from pyeditfast import backend
from pyeditfast.ops import compiled

# For bench.gpu.
sys.path.append(str(Path(__file__).parents[2]))
# Inputs and bounds that the Triton kernels' tests use too; they need triton.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))
if importlib.util.find_spec("triton") is None:
    collect_ignore = ["test_cuda_routed_linear.py", "test_cuda_activation_gap.py"]


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """Return the compiled module whose CUDA functions take CPU memory."""
    return emulated.load(emulated.build())


@pytest.fixture
def cuda(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every op take its CUDA form, or fail."""
    monkeypatch.setattr(compiled, "load_extension", lambda: emulated_module)
    with backend("cuda"):
        yield


@pytest.fixture(params=["0", "1", "2"], ids=["blocks in order", "shuffled", "shuffled anew"])
def block_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a kernel in several orders, as a GPU may."""
    monkeypatch.setenv("PYEDITFAST_BLOCK_ORDER", request.param)


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill every new tensor with NaN, and fail the test if a kernel wrote beside one."""
    from guarded_memory import GuardedMemory

    memory = GuardedMemory()
    monkeypatch.setattr(torch, "empty", memory.empty)
    yield
    memory.check()
