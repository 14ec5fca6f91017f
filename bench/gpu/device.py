"""Step ``device``: is there a GPU, what is it, and does a kernel run on it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bench.gpu.options import device_of, parser
from bench.gpu.rows import emit


def versions() -> dict[str, str]:
    """Return the versions of what matters for speed; of pyeditfast, what is in the checkout."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("triton", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    found["cuda"] = str(torch.version.cuda)
    return found


def driver() -> str:
    """Return the version of the GPU's driver, or "unknown"."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "unknown"
    return ran.stdout.split("\n")[0].strip() if ran.returncode == 0 else "unknown"


def describe(device: torch.device) -> tuple[str, dict[str, Any]]:
    """Return the device's name and what is known of it."""
    if device.type == "cpu":
        return "CPU", {"driver": "none"}
    found = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return found.name, {
        "driver": driver(),
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": total,
        "free_memory_bytes": free,
        "l2_bytes": l2_bytes(device),
    }


def l2_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache; 50 MB where torch does not tell."""
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "L2_cache_size", 50_000_000))


def check_a_kernel(device: torch.device) -> None:
    """Report whether Triton compiles and runs a kernel here."""
    about = {"op": "gram", "backend": "triton", "case": "ones", "what": "a first kernel runs"}
    try:
        from pyeditfast_kernels.gram import gram

        keys = torch.ones(1, 32, 64, device=device, dtype=torch.bfloat16)
        found = gram(keys, 1.0)[0, 0, :2].tolist()
    except Exception as error:
        emit("check", **about, status="failed", detail=f"{type(error).__name__}: {error}"[:500])
        return
    status = "passed" if found == [65.0, 64.0] else "failed"
    emit("check", **about, status=status, detail=f"{found}, and [65.0, 64.0] is right")


def main() -> None:
    """Run a product, describe the device, and run a kernel."""
    device = device_of(parser(__doc__).parse_args())
    a = torch.ones(64, 64, device=device)
    if (a @ a)[0, 0].item() != 64.0:
        raise SystemExit("a matrix product of ones is wrong")
    name, description = describe(device)
    emit("device", name=name, description=description, versions=versions())
    check_a_kernel(device)


if __name__ == "__main__":
    main()
