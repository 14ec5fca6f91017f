"""Which Python runs the steps: the one in ``.venv`` or the one that was started, and why."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

PROBE = """
import json, sys
found = {"python": "%d.%d.%d" % sys.version_info[:3], "torch": None, "cuda": None, "gpu": None}
try:
    import torch
    found.update(torch=str(torch.__version__), cuda=torch.version.cuda)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python, and what its torch says."""

    path: str
    python: str | None = None
    torch: str | None = None
    gpu: str | None = None
    problem: str | None = None

    def describe(self) -> str:
        """Return a part of a sentence."""
        if self.problem:
            return f"{self.path}: {self.problem}"
        if self.gpu is None:
            return f"{self.path}: torch {self.torch} sees no CUDA device"
        return f"{self.path} (Python {self.python}, torch {self.torch}, {self.gpu})"


def look_at(path: str) -> Interpreter:
    """Ask a Python for its torch and its GPU, in a process of its own."""
    try:
        ran = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, timeout=120)
        found = json.loads(ran.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Interpreter(path, problem="importing torch took over 120 s")
    except (OSError, IndexError, json.JSONDecodeError) as error:
        return Interpreter(path, problem=f"it does not run ({type(error).__name__})")
    if found["torch"] is None:
        return Interpreter(path, found["python"], problem=f"no torch ({found.get('error')})")
    if found["gpu"] is None and "error" in found:
        return Interpreter(path, found["python"], found["torch"], problem=found["error"])
    return Interpreter(path, found["python"], found["torch"], found["gpu"])


def choose(candidates: list[str]) -> tuple[Interpreter | None, str]:
    """Return the first Python whose torch sees a GPU, if any, and a sentence that says why it."""
    passed_over: list[Interpreter] = []
    for path in dict.fromkeys(candidates):
        found = look_at(path)
        if found.gpu is not None:
            reasons = "; ".join(other.describe() for other in passed_over)
            return found, f"using {found.describe()}" + (f"; not {reasons}" if reasons else "")
        passed_over.append(found)
    seen = "; ".join(other.describe() for other in passed_over)
    return None, f"no CUDA device for torch here ({seen})"


def candidates(venv: Path | None, own: str) -> list[str]:
    """Return the Pythons to look at: that of ``venv`` where it exists, then ``own``."""
    inside = [] if venv is None else [venv / "bin" / "python"]
    return [*(str(path) for path in inside if path.exists()), own]
