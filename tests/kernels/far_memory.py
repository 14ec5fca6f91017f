"""Tensors of any size and stride without memory, to see which addresses a kernel computes.

For Triton's interpreter only: its loads give zeros and its stores are noted.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch


class FarTensor:
    """Has what launchers and the interpreter ask of a tensor; row-major unless ``strides`` say."""

    def __init__(
        self, base: int, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] = ()
    ) -> None:
        self.base, self.shape, self.dtype = base, shape, dtype
        self.ndim = len(shape)
        self.device = torch.device("cpu")
        self._strides = strides or tuple(
            int(np.prod(shape[place + 1 :], dtype=np.int64)) for place in range(len(shape))
        )

    def stride(self, dim: int | None = None):
        return self._strides if dim is None else self._strides[dim]

    def size(self) -> tuple[int, ...]:
        return self.shape

    def storage_offset(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.base

    def untyped_storage(self) -> FarTensor:
        return self

    def cpu(self) -> FarTensor:
        return self

    def new_empty(self, *size: int, device: str) -> FarTensor:
        return self

    def set_(self, *arguments: object) -> None:
        """Take nothing over: there is no memory."""

    def copy_(self, other: object) -> None:
        """Copy nothing: there is no memory."""

    def address(self, *index: int) -> int:
        """Return the address of an element."""
        offset = sum(i * stride for i, stride in zip(index, self._strides, strict=True))
        return self.base + self.dtype.itemsize * offset


class Addresses:
    """The addresses that kernels loaded from and stored to, each once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime import interpreter

        self.loaded: set[int] = set()
        self.stored: set[int] = set()

        def load(pointers, mask, other, dtype):
            self.loaded.update(pointers[np.broadcast_to(mask, pointers.shape)].tolist())
            return np.zeros(pointers.shape, dtype)

        def store(pointers, value, mask):
            self.stored.update(pointers[np.broadcast_to(mask, pointers.shape)].tolist())

        monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(load=load, store=store))
