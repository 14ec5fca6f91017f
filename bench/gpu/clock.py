"""How long a call takes: CUDA events on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

FEWEST_ROUNDS = 5
MOST_ROUNDS = 50

SCRATCH_BYTES = 256 << 20

MOST_PASSES = 20


@dataclass(frozen=True)
class Measurement:
    """Median and quartiles of the device's time, and the median time that the host took to ask."""

    median: float
    quartiles: tuple[float, float]
    rounds: int
    host: float


class Clock(Protocol):
    """Times one call at a time."""

    def prepare(self, host_seconds: float) -> None:
        """Clear the caches; keep the device busy until a call of ``host_seconds`` is queued."""

    def time(self, call: Callable[[], object]) -> tuple[Callable[[], float], float]:
        """Make the call; return how to read the device's seconds later, and the host's seconds."""

    def wait(self) -> None:
        """Wait until everything is done."""


class CudaClock:
    """Events around each call, behind a pass over memory that is far larger than the L2 cache.

    The pass reads and does not write, so that nothing is left to be written back while the call
    runs, and it lasts until the host has queued the call: what is timed is the device's work, and
    the host's only where the call waits for the device.
    """

    def __init__(self, device: torch.device, l2_bytes: int) -> None:
        self.device = device
        size = max(SCRATCH_BYTES, 4 * l2_bytes)
        self.scratch = torch.zeros(size // 4, device=device)
        self.sum = torch.zeros((), device=device)
        self._pass()
        start, end = self._event(), self._event()
        start.record()
        self._pass()
        end.record()
        end.synchronize()
        self.pass_seconds = max(1e-5, start.elapsed_time(end) / 1e3)

    def _pass(self) -> None:
        torch.sum(self.scratch, 0, out=self.sum)

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def prepare(self, host_seconds: float) -> None:
        """Read the scratch memory, as often as it takes to cover ``host_seconds``."""
        for _ in range(min(MOST_PASSES, 1 + int(2 * host_seconds / self.pass_seconds))):
            self._pass()

    def time(self, call: Callable[[], object]) -> tuple[Callable[[], float], float]:
        """Record events around the call."""
        start, end = self._event(), self._event()
        begun = time.perf_counter()
        start.record()
        call()
        end.record()
        host = time.perf_counter() - begun
        return lambda: start.elapsed_time(end) / 1e3, host

    def wait(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)


class HostClock:
    """Stands in for ``CudaClock`` where there is no GPU."""

    def prepare(self, host_seconds: float) -> None:
        """Do nothing."""

    def time(self, call: Callable[[], object]) -> tuple[Callable[[], float], float]:
        """Time the call on the host."""
        begun = time.perf_counter()
        call()
        elapsed = time.perf_counter() - begun
        return lambda: elapsed, elapsed

    def wait(self) -> None:
        """Do nothing."""


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    if device.type == "cpu":
        return HostClock()
    from bench.gpu.device import l2_bytes

    return CudaClock(device, l2_bytes(device))


def measure(
    clock: Clock,
    call: Callable[[int], object],
    before: Callable[[int], object],
    budget: float,
) -> Measurement:
    """Time ``call(round)`` after ``before(round)``, for about ``budget`` seconds.

    Two calls warm up (the first compiles); a third says how many rounds the budget allows.
    """
    for number in range(2):
        before(number)
        call(number)
    clock.wait()
    before(2)
    begun = time.perf_counter()
    read, host = clock.time(lambda: call(2))
    clock.wait()
    took = max(time.perf_counter() - begun, 1e-6)
    fewest = FEWEST_ROUNDS if FEWEST_ROUNDS * took <= 4 * budget else 3
    rounds = max(fewest, min(MOST_ROUNDS, int(budget / took)))
    readings, hosts = [], []
    for number in range(rounds):
        before(number)
        clock.prepare(host)
        read, asked = clock.time(lambda number=number: call(number))  # type: ignore[misc]
        readings.append(read)
        hosts.append(asked)
    clock.wait()
    seconds = sorted(read() for read in readings)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Measurement(median, (low, high), rounds, statistics.median(hosts))
