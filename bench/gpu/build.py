"""Step ``build``: compile ``pyeditfast/_csrc`` in place, for this GPU alone, where possible.

A failure is a row in the table; everything else runs without the module.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import torch

from bench.gpu.options import device_of, parser
from bench.gpu.places import BUILD, REPOSITORY
from bench.gpu.rows import emit

NEEDED = ("setuptools", "pybind11")


def status() -> tuple[bool, str]:
    """Ask a new process whether the module loads, and how it was built."""
    program = (
        "from pyeditfast.extension import extension_status, load_extension; "
        "print(load_extension() is not None); print(extension_status())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    lines = ran.stdout.strip().splitlines()
    if ran.returncode != 0 or len(lines) < 2:
        return False, ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else "no answer"
    return lines[0] == "True", lines[1]


def build(device: torch.device) -> None:
    """Compile, with the output in this step's log."""
    environment = {**os.environ, "PYEDITFAST_BUILD_CSRC": "1"}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        # Instructions that only one generation has need the suffix.
        suffix = "a" if major >= 9 else ""
        own = f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}{suffix}-real"
        environment["CMAKE_ARGS"] = f"{environment.get('CMAKE_ARGS', '')} {own}".strip()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    command += ["--build-temp", str(BUILD / "csrc")]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)


def main() -> None:
    """Build and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--if-missing", action="store_true", help="keep a module that loads")
    options = arguments.parse_args()
    loads, said = status()
    if loads and options.if_missing:
        emit("note", status="passed", detail=f"kept: {said}")
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        emit(
            "note", status="not available", detail=f"no {', '.join(missing)} to build with; {said}"
        )
        return
    try:
        build(device_of(options))
    except subprocess.CalledProcessError as error:
        emit("note", status="failed", detail=f"the build ended with status {error.returncode}")
        return
    loads, said = status()
    emit("note", status="passed" if loads else "failed", detail=said)


if __name__ == "__main__":
    main()
