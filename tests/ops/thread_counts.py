"""Whatever the number of threads, an op gives the same bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from layouts import same_bits
from torch import Tensor


def assert_same_bits_on_any_threads(run: Callable[[], Tensor]) -> None:
    """Require that ``run`` returns the same bits on 1, 2, 3 and 5 threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    assert results[0].count_nonzero() > 0
    assert all(same_bits(result, results[0]) for result in results)
