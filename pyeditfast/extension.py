"""The compiled module ``pyeditfast._csrc``: loaded if it is there, and if not, why not."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

_NAME = "pyeditfast._csrc"
# setup.py leaves the reason here when it installs without the compiled module.
_REASON_FILE = Path(__file__).with_name("_csrc_missing.txt")


def load_extension() -> ModuleType | None:
    """Return the compiled module, or None where it cannot be imported; the first call decides."""
    return _attempt()[0]


def extension_status() -> str:
    """Return a sentence on the compiled module: what built it, or why it is missing."""
    return _attempt()[1]


@functools.cache
def _attempt() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            return None, f"the compiled module {_NAME} does not load: {error}"
        return None, f"the compiled module {_NAME} is missing: {_why_missing()}"
    except ImportError as error:
        return None, f"the compiled module {_NAME} does not load: {error}"
    info = module.build_info()
    cuda = f"CUDA {info['cuda_version']}" if info["cuda"] else f"no CUDA ({info['cuda_note']})"
    start = start_of_torch_threads()
    module.share_threads(start)
    threads = "its own threads" if start == 0 else "torch's threads"
    return (
        module,
        f"the compiled module {_NAME} was built with {info['compiler']}, {cuda}; it runs on "
        f"{threads}",
    )


def start_of_torch_threads() -> int:
    """Return the address of the function that starts torch's threads, 0 where there is none."""
    torch = sys.modules.get("torch")
    if torch is None or torch.__file__ is None:
        return 0
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    try:
        # Loaded long ago. The name is looked up in what it was linked with, too: the one OpenMP
        # runtime that torch itself runs on.
        function = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _why_missing() -> str:
    try:
        return _REASON_FILE.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return "it was not built here; install pyeditfast again where a C++ compiler is found"
