"""Step ``sanitizer``: the kernels on tiny inputs under ``compute-sanitizer``, where it is found.

``--tool memcheck`` finds accesses outside of allocations, ``--tool racecheck`` races in shared
memory. torch allocates each tensor by itself meanwhile, so that a stray access is seen.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.gpu import rows
from bench.gpu.options import parser
from bench.gpu.plan import OPS

KERNELS = "triton,cuda"
"""The backends that run kernels of ours."""

PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")

PATIENCE = 120.0
"""Seconds; less than the step's own limit, so that what was found by then is reported."""

ERRORS_FOUND = 99


def find_tool() -> str | None:
    """Return the program, from the PATH or where CUDA is usually installed."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [str(Path(home) / "bin") for home in homes]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders, *PLACES])
    return shutil.which("compute-sanitizer", path=path)


def run(program: str, tool: str, row_file: Path, ops: tuple[str, ...]) -> tuple[int | None, str]:
    """Return the exit status (None where it took too long) and the output."""
    own = ["-m", "bench.gpu.correctness", "--device", "cuda", "--size", "tiny"]
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        str(ERRORS_FOUND),
        "--print-limit",
        "20",
        # Libraries ask for what a driver may refuse, and go on.
        "--report-api-errors",
        "no",
        sys.executable,
        *own,
        "--ops",
        ",".join(ops),
        "--backends",
        KERNELS,
        # They need the allocator that is switched off below.
        "--no-graphs",
    ]
    environment = {
        **os.environ,
        rows.VARIABLE: str(row_file),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        log.seek(0)
        return code, log.read()


def judge(tool: str, code: int | None, output: str, done: int) -> tuple[str, str]:
    """Return status and detail for what the tool printed after ``done`` checks."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: ([^\n]*)", output)
    if re.search(r"Device not supported|not supported on this|Unable to find injection", output):
        return "not available", "compute-sanitizer does not support this device or driver"
    found = re.findall(r"=========\s+((?:Invalid|Misaligned|Error: |Race)[^\n]*)", output)
    kernels = Counter(re.findall(r"\b(\w+_kernel)\b", output))
    if code == ERRORS_FOUND or found:
        names = ", ".join(kernels) or "no kernel of ours is named"
        return "failed", f"{summary[1] if summary else 'errors'}; {found[:1]}; {names}"[:400]
    if code is None:
        return "skipped", f"stopped after {PATIENCE:.0f} s and {done} checks, nothing found so far"
    if code != 0:
        return "failed", f"it ended with status {code}: {' | '.join(output.split(chr(10))[-4:])}"[
            :400
        ]
    if not done:
        return "not available", "there are no kernels to check"
    return "passed", f"{done} checks; {summary[1] if summary else 'no summary'}"


def main() -> None:
    """Run one tool over all ops."""
    arguments = parser(__doc__)
    arguments.add_argument("--tool", choices=("memcheck", "racecheck"), required=True)
    options = arguments.parse_args()
    program = find_tool() if options.device == "cuda" else None
    if program is None:
        rows.emit("note", status="not available", detail="compute-sanitizer was not found")
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        row_file = Path(folder) / "rows"
        code, output = run(program, options.tool, row_file, OPS)
        found, _ = rows.read(row_file)
    print(output)
    ran = [row for row in found if row["kind"] == "check" and row["status"] in ("passed", "failed")]
    status, detail = judge(options.tool, code, output, len(ran))
    rows.emit(
        "check",
        op="all kernels",
        backend=options.tool,
        case="tiny inputs",
        what="compute-sanitizer",
        status=status,
        detail=f"{detail} ({time.monotonic() - begun:.0f} s)",
    )


if __name__ == "__main__":
    main()
