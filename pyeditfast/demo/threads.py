"""One thread or all of them, whichever is quicker for repeated small steps."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

WARM_UP = 2
TRIALS = 4


class QuickerThreads:
    """Tries steps with all threads and with one in turn, and goes on with the quicker.

    Threads that wait for each other lose several times over what they gain when other processes
    take their cores. That cannot be known beforehand and may begin at any time, so all threads are
    given up for one as soon as the median of the last few steps is slower than one thread was. On
    leaving, torch has as many threads as before.
    """

    def __init__(self) -> None:
        self._all = torch.get_num_threads()
        self._alone = self._all == 1
        self._steps = 0
        self._seconds_of_all: deque[float] = deque(maxlen=TRIALS)
        self._seconds_of_one: deque[float] = deque(maxlen=TRIALS)

    def __enter__(self) -> QuickerThreads:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if torch.get_num_threads() != self._all:
            torch.set_num_threads(self._all)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run one step inside a ``with`` block."""
        if self._alone:
            yield
            return
        number = self._steps - WARM_UP
        self._steps += 1
        in_trial = number < 2 * TRIALS
        one = in_trial and number % 2 == 1
        torch.set_num_threads(1 if one else self._all)
        start = time.perf_counter()
        yield
        if number >= 0:
            seconds = self._seconds_of_one if one else self._seconds_of_all
            seconds.append(time.perf_counter() - start)
        if number >= 2 * TRIALS - 1 and statistics.median(self._seconds_of_all) > statistics.median(
            self._seconds_of_one
        ):
            self._alone = True
            torch.set_num_threads(1)
