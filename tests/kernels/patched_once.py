"""Triton's interpreter without a waste of its own.

It replaces the functions of ``triton.language`` when a kernel is launched, and looks for them all
over again whenever the kernel calls a helper, although it finds none left: up to half of its time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter replace nothing for a helper if all that it calls has been replaced."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return  # Another Triton, with ways of its own.
    patch = interpreter._patch_lang

    @functools.cache
    def languages(fn: Callable[..., Any]) -> list[Any]:
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def patch_what_is_left(fn: Callable[..., Any]) -> Any:
        members = [tl.tensor.to, *(language.load for language in languages(fn))]
        if any(map(tl.core.is_builtin, members)):
            return patch(fn)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_patch_lang", patch_what_is_left)
