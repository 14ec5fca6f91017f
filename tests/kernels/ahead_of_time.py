"""Compile every kernel for every architecture on a machine that may have no GPU.

``python tests/kernels/ahead_of_time.py``           compile, and print what was found as JSON
``python tests/kernels/ahead_of_time.py --names``   print only what would be compiled
``python tests/kernels/ahead_of_time.py --op NAME`` one op only
``python tests/kernels/ahead_of_time.py --write``   compile, and write ``docs/kernels.md``

A kernel's file says in ``examples()`` how its launcher is called, and in ``tunable()`` between
which configurations ``make tune`` chooses; the launches that this makes are specialized as Triton
would at run time. Triton does not compile in a process that has ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 86, 89, 90)

LIKE_80 = (86, 89)
"""Architectures that get the program of sm_80, in PTX, from which each has machine code made.

To let Triton make it anew for every variant would take half as long again. For the first variant of
every kernel it does, and the programs have to be equal.
"""

TABLE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}

INTRO = """# Kernels

Every Triton kernel, in every configuration and specialization that its launcher asks for, compiled
ahead of time. No GPU has to be there for this, and none of these figures is a time. *Registers* are
those of a thread; *shared memory* is that of a block and *stack* that of a thread, in bytes: what
does not fit the registers is spilled to the stack. *Tensor cores* and *16-byte loads* say whether
the machine code has them, where a kernel needs them.

`python tests/kernels/ahead_of_time.py --write` writes this page; it was made with triton {triton}.
"""

COLUMNS = (
    "op",
    "kernel",
    "example",
    "configuration",
    "architecture",
    "registers",
    "shared memory",
    "stack",
    "tensor cores",
    "16-byte loads",
)


ANSWERS = {True: "yes", False: "no", None: ""}


@dataclass(frozen=True)
class Variant:
    """One specialization of one kernel."""

    op: str
    kernel: str
    example: str
    configuration: str

    needs_tensor_cores: bool
    needs_wide_loads: bool

    module: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> tuple[str, str, str, str]:
        """Return what the table shows of it."""
        return self.op, self.kernel, self.example, self.configuration


@dataclass(frozen=True)
class Program:
    """A variant in PTX and in machine code."""

    architecture: int
    ptx: str
    cubin: bytes
    shared_memory: int

    @property
    def instructions(self) -> str:
        """Return the PTX without the lines that name the architecture."""
        return re.sub(r"^\.(?:version|target) .*", "", self.ptx, flags=re.M)


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a variant holds; None for what the variant does not need."""

    op: str
    kernel: str
    example: str
    configuration: str
    architecture: int
    registers: int
    shared_memory: int
    stack: int
    tensor_cores: bool | None
    wide_loads: bool | None


def specialize(arguments: dict[str, Any], kernel: Any) -> tuple[dict, dict, list]:
    """Return signature, constants and the arguments divisible by 16, as Triton's launch does it."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[str] = []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        divisible = False
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[parameter.name] = "constexpr", 1
                continue
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            raise TypeError(f"{parameter.name} of {kernel.__name__} is {value!r}")
        if divisible and not parameter.do_not_specialize_on_alignment:
            aligned.append(parameter.name)
    return signature, constants, aligned


def variants(op: str | None = None) -> list[Variant]:
    """Return every specialization that the examples of ``op`` (or of all) ask for, once each."""
    import pyeditfast_kernels
    from pyeditfast_kernels.launch import recording

    found: dict[str, Variant] = {}
    for info in pkgutil.iter_modules(pyeditfast_kernels.__path__):
        if op not in (None, info.name):
            continue
        module = importlib.import_module(f"pyeditfast_kernels.{info.name}")
        for example in examples_of(module):
            with recording() as launches:
                example.call()
            for launch in launches:
                kernel, config = launch.kernel, launch.config
                arguments = {**launch.arguments, **config.sizes}
                unknown = set(arguments) ^ {parameter.name for parameter in kernel.params}
                if unknown:
                    raise TypeError(f"{kernel.__name__} and its launcher differ in {unknown}")
                signature, constants, aligned = specialize(arguments, kernel)
                variant = Variant(
                    op=info.name,
                    kernel=kernel.__name__,
                    example=example.name,
                    configuration=config.name,
                    needs_tensor_cores=kernel.__name__ in example.tensor_cores,
                    needs_wide_loads=kernel.__name__ in example.wide_loads,
                    module=module.__name__,
                    signature=signature,
                    constants=constants,
                    aligned=aligned,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )
                key = repr([*variant.name[:2], *list(asdict(variant).values())[6:]])
                found.setdefault(key, variant)
    return list(found.values())


def examples_of(module: Any) -> list[Any]:
    """Return the calls of a kernel's file: its examples, and what ``make tune`` chooses between."""
    from pyeditfast_kernels.launch import Example

    examples = list(module.examples()) if hasattr(module, "examples") else []
    tensor_cores = {kernel for example in examples for kernel in example.tensor_cores}
    wide_loads = {kernel for example in examples for kernel in example.wide_loads}
    meta = torch.device("meta")
    for choice in module.tunable() if hasattr(module, "tunable") else ():
        inputs = choice.inputs(meta, False)
        examples += [
            Example(
                f"tuning, {choice.shape_class}: {config.name}",
                functools.partial(choice.call, inputs, config),
                tuple(tensor_cores),
                tuple(wide_loads),
            )
            for config in choice.candidates
        ]
    return examples


def compile_for(variant: Variant, architecture: int) -> Program:
    """Let Triton compile a variant for ``sm_<architecture>``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=variant.signature,
        constexprs={(place(name),): value for name, value in variant.constants.items()},
        attrs={(place(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    asm = compiled.asm
    return Program(architecture, asm["ptx"], asm["cubin"], compiled.metadata.shared)


def assemble(program: Program, architecture: int) -> Program:
    """Return the same program in the machine code of another architecture."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "program.ptx", Path(folder) / "program.cubin"
        ptx.write_text(program.ptx)
        tool("ptxas", "-lineinfo", f"--gpu-name=sm_{architecture}", str(ptx), "-o", str(cubin))
        return Program(architecture, program.ptx, cubin.read_bytes(), program.shared_memory)


def programs(variant: Variant, is_first: bool) -> list[Program]:
    """Return a variant for every architecture; ``is_first`` says that it is its kernel's first."""
    found = {cc: compile_for(variant, cc) for cc in ARCHITECTURES if cc not in LIKE_80}
    for cc in LIKE_80:
        found[cc] = compile_for(variant, cc) if is_first else assemble(found[80], cc)
        if found[cc].instructions != found[80].instructions:
            raise RuntimeError(f"for {variant.name} sm_{cc} has another program than sm_80")
    return [found[cc] for cc in ARCHITECTURES]


def compile_variant(variant: Variant, is_first: bool) -> list[Compiled]:
    """Compile for every architecture and read the machine code."""
    results = []
    codes: dict[str, str] = {}
    for program in programs(variant, is_first):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(program.cubin)
            file.flush()
            usage = tool("cuobjdump", "-res-usage", file.name)
            # To disassemble takes long, and of equal programs one will do.
            key = program.instructions
            if key not in codes and (variant.needs_tensor_cores or variant.needs_wide_loads):
                codes[key] = tool("nvdisasm", "-c", "-ndf", file.name)
        used = {name: int(size) for name, size in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        code = codes.get(key, "")
        tensor_cores = re.search(r"\b[HIQ]G?MMA\b", code) is not None
        results.append(
            Compiled(
                *variant.name,
                architecture=program.architecture,
                registers=used["REG"],
                shared_memory=program.shared_memory,
                stack=used["STACK"] + used["LOCAL"],
                tensor_cores=tensor_cores if variant.needs_tensor_cores else None,
                wide_loads=loads_are_wide(code) if variant.needs_wide_loads else None,
            )
        )
    return results


def loads_are_wide(code: str) -> bool:
    """Say whether the machine code loads most of its bytes 16 at a time, or by tensor descriptors.

    Instructions are counted, not their executions: a narrow load of one row beside a loop that
    reads the rest is no fault.
    """
    if "UTMALDG" in code:
        return True
    widths = []
    for modifiers in re.findall(r"\bLDG(?:STS)?\.(\S+)", code):
        width = re.search(r"(?:^|\.)[US]?(128|64|16|8)(?:\.|$)", modifiers)
        widths.append(int(width[1]) if width else 32)
    return 2 * sum(width for width in widths if width == 128) > sum(widths)


def tool(name: str, *arguments: str) -> str:
    """Return what a program that Triton ships prints."""
    import triton

    program = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def compile_all(workers: int, op: str | None = None) -> list[Compiled]:
    """Compile every variant of ``op`` (or of all) for every architecture."""
    found = variants(op)
    kernels = [variant.kernel for variant in found]
    is_first = [kernel not in kernels[:place] for place, kernel in enumerate(kernels)]
    with ProcessPoolExecutor(workers) as pool:
        return list(itertools.chain.from_iterable(pool.map(compile_variant, found, is_first)))


def table(results: list[Compiled]) -> Iterator[str]:
    """Yield the lines of the page that shows the results."""
    import triton

    yield from INTRO.format(triton=triton.__version__).splitlines()
    yield ""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    for result in results:
        cells = (
            f"`{result.op}`",
            f"`{result.kernel}`",
            result.example,
            result.configuration,
            f"sm_{result.architecture}",
            result.registers,
            result.shared_memory,
            result.stack,
            ANSWERS[result.tensor_cores],
            ANSWERS[result.wide_loads],
        )
        yield f"| {' | '.join(str(cell) for cell in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", action="store_true", help="print only what would be compiled")
    parser.add_argument("--op", help="compile the kernels of one op only")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set; Triton does not compile in its interpreter")
    if arguments.names:
        print(json.dumps([variant.name for variant in variants(arguments.op)], indent=0))
        return
    if arguments.write and arguments.op:
        parser.error("--write needs every op")
    results = compile_all(arguments.workers, arguments.op)
    if arguments.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text("\n".join(table(results)) + "\n", encoding="utf-8")
        return
    print(json.dumps([asdict(result) for result in results], indent=0))


if __name__ == "__main__":
    main()
