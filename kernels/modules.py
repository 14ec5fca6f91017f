"""How tensors reach the kernels: their leading dimensions as one, and whether rows are aligned."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor


def as_modules(*tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield views ``[modules, rows, columns]`` of tensors ``[..., rows, columns]``, never copies.

    With each come the number of modules before it. All tensors have the same leading dimensions;
    where their strides do not let one view hold them all, there are several.
    """
    lead = tensors[0].shape[:-2]
    if not lead:
        yield 0, [tensor.unsqueeze(0) for tensor in tensors]
        return
    try:
        yield 0, [tensor.view(math.prod(lead), *tensor.shape[-2:]) for tensor in tensors]
    except RuntimeError:
        inner = math.prod(lead[1:])
        for place in range(lead[0]):
            for first, views in as_modules(*(tensor[place] for tensor in tensors)):
                yield place * inner + first, views


def aligned(*tensors: Tensor) -> bool:
    """Say whether Triton can read all tensors ``[..., rows, columns]`` 16 bytes at a time.

    That needs sizes and strides that are multiples of 16, but for the stride of 1.
    """
    return all(_is_aligned(tensor) for tensor in tensors)


def _is_aligned(tensor: Tensor) -> bool:
    near = -1 if tensor.stride(-1) == 1 else -2
    far = [stride for place, stride in enumerate(tensor.stride()) if place != tensor.ndim + near]
    return (
        tensor.stride(near) == 1
        and tensor.shape[near] % 16 == 0
        and tensor.data_ptr() % 16 == 0
        and all(stride % 16 == 0 for stride in far)
    )
