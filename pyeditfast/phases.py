"""Seconds by phase, on a GPU without waiting for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

MOST_PENDING = 512
"""CUDA events kept unread; the older half is long finished by then, so reading it waits for
nothing.
"""


class PhaseClock:
    """Adds up the time spent in named phases.

    With CUDA devices, events are recorded on each device's current stream, so that nothing waits
    before ``seconds`` is asked for; a phase counts on the device where it took longest.
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self._cuda = [device for device in devices if device.type == "cuda"]
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside a ``with`` block for phase ``name``."""
        if not self._cuda:
            start = time.perf_counter()
            try:
                yield
            finally:
                elapsed = time.perf_counter() - start
                self._seconds[name] = self._seconds.get(name, 0.0) + elapsed
            return
        starts = self._record()
        try:
            yield
        finally:
            self._pending.append((name, list(zip(starts, self._record(), strict=True))))
            if len(self._pending) > MOST_PENDING:
                self._count(self._pending[: MOST_PENDING // 2])
                del self._pending[: MOST_PENDING // 2]

    def _record(self) -> list[torch.cuda.Event]:
        events = []
        for device in self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        return events

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase so far; on CUDA this waits for the work to finish."""
        self._count(self._pending)
        self._pending.clear()
        return dict(self._seconds)

    def _count(
        self, measured: list[tuple[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]]
    ) -> None:
        for name, pairs in measured:
            for _, end in pairs:
                end.synchronize()
            elapsed = max(start.elapsed_time(end) for start, end in pairs) / 1e3
            self._seconds[name] = self._seconds.get(name, 0.0) + elapsed
