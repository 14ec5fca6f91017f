"""Holding back an interrupt while weights are half written."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interrupt_held_back() -> Iterator[None]:
    """Deliver a Ctrl-C or a polite kill that arrives inside a ``with`` block only after it.

    Python delivers signals to the main thread alone, so elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # What the default action or nobody handles in Python, Python cannot hold back.
    held = {number: handler for number, handler in previous.items() if callable(handler)}
    arrived: list[tuple[int, FrameType | None]] = []
    for number in held:
        signal.signal(number, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    if arrived:
        held[signal.Signals(arrived[0][0])](*arrived[0])
