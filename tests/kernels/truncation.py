"""Tensor cores that cut off when they accumulate, as the real ones do, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest


def truncate_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``tl.dot`` add 16 products at a time, exactly, and round each sum towards zero."""
    from triton.runtime import interpreter

    def dot(self, a, b, total, input_precision, max_num_imprecise_acc):
        data = total.data
        for start in range(0, a.data.shape[1], 16):
            slab = slice(start, start + 16)
            exact = data + a.data[:, slab].astype(np.float64) @ b.data[slab].astype(np.float64)
            data = exact.astype(np.float32)
            away = np.abs(data) > np.abs(exact)
            data[away] = np.nextafter(data[away], np.float32(0.0))
        return interpreter.TensorHandle(data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
