"""Arithmetic that the interpreter cannot show, where a kernel promises the reference's bits.

Triton lets the compiler fuse a product with the sum after it, which rounds once instead of twice,
take the smallest numbers for zero, and drop NaN where it takes a minimum; the interpreter does not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
    import importlib
    import json
    import sys

    import ahead_of_time
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    codes = {}
    for op in sys.argv[1:]:
        variant = next(each for each in ahead_of_time.variants(op) if "fp" in each.example
                       or "float32" in each.example)
        kernel = getattr(importlib.import_module(variant.module), variant.kernel)
        place = kernel.arg_names.index
        source = ASTSource(
            fn=kernel,
            signature=variant.signature,
            constexprs={(place(name),): value for name, value in variant.constants.items()},
            attrs={(place(name),): [["tt.divisibility", 16]] for name in variant.aligned},
        )
        options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
        codes[op] = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print(json.dumps(codes))
"""

OPS = ("masked_sgd", "masked_sgd_product", "ties_merge")


@pytest.fixture(scope="module")
def codes() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    here = Path(__file__).resolve().parent
    search = [str(here), str(here.parents[1]), environment.get("PYTHONPATH", "")]
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *OPS],
        env={**environment, "PYTHONPATH": os.pathsep.join(search)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-10_000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("op", OPS)
def test_products_are_rounded_before_they_are_added(codes, op):
    # Without ``.rn`` the assembler may fuse.
    products = set(re.findall(r"\b(?:mul|fma)(?:\.\w+)*\.f32\b", codes[op]))
    assert products == {"mul.rn.f32"}


@pytest.mark.parametrize("op", OPS)
def test_the_smallest_numbers_are_not_taken_for_zero(codes, op):
    assert ".ftz" not in codes[op]


@pytest.mark.parametrize("op", ["masked_sgd", "masked_sgd_product"])
def test_what_is_not_a_number_is_not_clamped(codes, op):
    bounds = set(re.findall(r"\b(?:max|min)(?:\.\w+)*\.f32\b", codes[op]))
    assert bounds == {"max.NaN.f32", "min.NaN.f32"}
