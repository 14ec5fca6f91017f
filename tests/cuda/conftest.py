"""The CUDA kernels of ``csrc`` on the CPU: the threads of a block as fibers, every access to shared
memory checked (``tests/csrc/block_executor.h``).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import emulated
import pytest

from pyeditfast import backend
from pyeditfast.ops import compiled


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
