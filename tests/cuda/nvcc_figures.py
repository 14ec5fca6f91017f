"""What nvcc makes of every CUDA kernel, on a machine that may have no GPU.

``python tests/cuda/nvcc_figures.py``          compile, and print the table
``python tests/cuda/nvcc_figures.py --write``  compile, and write ``docs/cuda_kernels.md``
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "cuda_kernels.md"
SOURCES = tuple(sorted((ROOT / "csrc").glob("*.cu")))
ARCHITECTURES = ("80", "86", "89", "90a")
FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v")

INTRO = """# CUDA kernels

Every CUDA kernel of `csrc`, as `nvcc` {version} compiles it. No GPU has to be there for this, and
none of these figures is a time; no GPU has run these kernels yet. *Registers* are those of a
thread, *stack* and *spilled* its bytes in memory. Shared memory is chosen at launch and never above
99 KB a block. *Tensor cores* and *16-byte loads* say whether the machine code has them.

`python tests/cuda/nvcc_figures.py --write` writes this page.

| file | kernel | architecture | registers | stack | spilled | tensor cores | 16-byte loads |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Figures:
    """One kernel on one architecture."""

    file: str
    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    tensor_cores: bool
    wide_loads: bool


def nvcc() -> str | None:
    """Return the compiler, or None where there is none."""
    return shutil.which("nvcc")


def version() -> str:
    """Return the compiler's version."""
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release [\d.]+, V([\d.]+)", printed.stdout)
    return found[1] if found else "of unknown version"


def disassembler() -> str | None:
    """Return cuobjdump: nvcc's, or the one that triton ships."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return found
    try:
        import triton
    except ImportError:
        return None
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(own) if own.is_file() else None


def short(mangled: str) -> str:
    """Return a kernel's name with its template arguments, without its namespaces."""
    demangled = subprocess.run(
        ["c++filt", mangled], capture_output=True, text=True, check=True
    ).stdout.strip()
    found = re.search(r"(\w+(?:<.*>)?)\((?!anonymous)[^()]*(?:\([^()]*\)[^()]*)*\)$", demangled)
    name = found[1] if found else demangled
    return re.sub(r"\(anonymous namespace\)::|\((?:int|bool)\)", "", name)


def instructions(cubin: Path) -> dict[str, str]:
    """Return the machine code of every kernel by its mangled name; empty without cuobjdump."""
    program = disassembler()
    if program is None:
        return {}
    text = subprocess.run(
        [program, "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def compile_one(source: Path, architecture: str) -> list[Figures]:
    """Return the figures of a file's kernels; raise ``RuntimeError`` with the compiler's words."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "-cubin", f"-I{ROOT / 'csrc'}"]
        ran = subprocess.run(
            [*command, str(source), "-o", str(cubin)], capture_output=True, text=True
        )
        if ran.returncode != 0:
            raise RuntimeError(f"{source.name}, sm_{architecture}: {ran.stderr[-5000:]}")
        code = instructions(cubin)
    return list(figures(source.name, architecture, ran.stderr, code))


def figures(file: str, architecture: str, log: str, code: dict[str, str]) -> Iterator[Figures]:
    """Yield what ptxas says of every kernel in its log."""
    for part in log.split("Compiling entry function '")[1:]:
        mangled = part.split("'")[0]
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert memory and registers, part
        machine_code = code.get(mangled, "")
        yield Figures(
            file,
            short(mangled),
            f"sm_{architecture}",
            int(registers[1]),
            int(memory[1]),
            int(memory[2]) + int(memory[3]),
            bool(re.search(r"\b[HD]MMA\.", machine_code)),
            bool(re.search(r"\bLDG\.E\.\S*128", machine_code)),
        )


def all_figures() -> list[Figures]:
    """Compile every file for every architecture."""
    pairs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        found = [one for some in pool.map(lambda pair: compile_one(*pair), pairs) for one in some]
    return sorted(found, key=astuple)


def rows(found: list[Figures]) -> list[str]:
    """Return the table's rows."""
    return [
        f"| `{one.file}` | `{one.kernel}` | {one.architecture} | {one.registers} | {one.stack} | "
        f"{one.spilled} | {'yes' if one.tensor_cores else ''} | {'yes' if one.wide_loads else ''} |"
        for one in found
    ]


def main() -> None:
    """Print the table, or write it."""
    page = INTRO.format(version=version()) + "\n".join(rows(all_figures())) + "\n"
    if sys.argv[1:] == ["--write"]:
        TABLE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
