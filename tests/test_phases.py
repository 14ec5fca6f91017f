"""PhaseClock: seconds by phase, on a GPU without waiting for it."""

from __future__ import annotations

import pytest
import torch

from pyeditfast import phases
from pyeditfast.phases import PhaseClock


class Time:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch) -> Time:
    fake = Time()
    monkeypatch.setattr(phases.time, "perf_counter", fake.perf_counter)
    return fake


@pytest.mark.parametrize("devices", [(), (torch.device("cpu"),)], ids=str)
def test_phases_add_up(time, devices):
    clock = PhaseClock(devices)
    assert clock.seconds() == {}
    with clock.phase("solve"):
        time.now += 2.0
    time.now += 50.0
    with clock.phase("apply"):
        time.now += 0.5
    with clock.phase("solve"):
        time.now += 3.0
    assert clock.seconds() == {"solve": 5.0, "apply": 0.5}
    assert list(clock.seconds()) == ["solve", "apply"]


def test_phases_nest(time):
    clock = PhaseClock()
    with clock.phase("turn"):
        time.now += 1.0
        with clock.phase("solve"):
            time.now += 2.0
        time.now += 4.0
    assert clock.seconds() == {"solve": 2.0, "turn": 7.0}


def test_a_phase_that_raises_is_counted(time):
    clock = PhaseClock()
    with pytest.raises(KeyError), clock.phase("solve"):
        time.now += 2.0
        raise KeyError("anything")
    assert clock.seconds() == {"solve": 2.0}


def test_seconds_are_a_copy(time):
    clock = PhaseClock()
    with clock.phase("solve"):
        time.now += 2.0
    clock.seconds()["solve"] = 0.0
    clock.seconds().clear()
    assert clock.seconds() == {"solve": 2.0}


def test_clocks_are_independent(time):
    first, second = PhaseClock(), PhaseClock()
    with first.phase("solve"):
        time.now += 2.0
        with second.phase("solve"):
            time.now += 1.0
    assert (first.seconds(), second.seconds()) == ({"solve": 3.0}, {"solve": 1.0})


# Two devices whose streams move on their own, in milliseconds.


class Stream:
    def __init__(self) -> None:
        self.milliseconds = 0.0


class Event:
    synchronized = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at: float | None = None

    def record(self, stream: Stream) -> None:
        self.at = stream.milliseconds

    def synchronize(self) -> None:
        Event.synchronized += 1

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def streams(monkeypatch) -> dict[int, Stream]:
    found = {0: Stream(), 1: Stream()}
    monkeypatch.setattr(Event, "synchronized", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found[device.index])
    return found


TWO_GPUS = (torch.device("cuda:0"), torch.device("cpu"), torch.device("cuda:1"))


def test_on_gpus_a_phase_counts_where_it_took_longest(streams):
    clock = PhaseClock(TWO_GPUS)
    with clock.phase("forward"):
        streams[0].milliseconds += 10.0
        streams[1].milliseconds += 30.0
    streams[0].milliseconds += 1000.0
    with clock.phase("forward"):
        streams[0].milliseconds += 50.0
        streams[1].milliseconds += 5.0
    assert clock.seconds() == {"forward": pytest.approx(0.080, abs=1e-12)}


def test_on_gpus_nothing_waits_before_seconds_are_asked_for(streams):
    clock = PhaseClock(TWO_GPUS)
    for _ in range(3):
        with clock.phase("forward"):
            streams[0].milliseconds += 10.0
    assert Event.synchronized == 0
    assert clock.seconds() == {"forward": pytest.approx(0.030, abs=1e-12)}
    # One wait for the end of each phase on each GPU, and none twice.
    assert Event.synchronized == 6
    assert clock.seconds() == {"forward": pytest.approx(0.030, abs=1e-12)}
    assert Event.synchronized == 6
    with clock.phase("forward"):
        streams[0].milliseconds += 10.0
    assert clock.seconds() == {"forward": pytest.approx(0.040, abs=1e-12)}


def test_on_gpus_a_phase_that_raises_is_counted(streams):
    clock = PhaseClock(TWO_GPUS)
    with pytest.raises(KeyError), clock.phase("forward"):
        streams[1].milliseconds += 10.0
        raise KeyError("anything")
    assert clock.seconds() == {"forward": pytest.approx(0.010, abs=1e-12)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_real_gpu():
    device = torch.device("cuda")
    clock = PhaseClock((device,))
    matrix = torch.ones(4096, 4096, device=device)
    with clock.phase("product"):
        matrix @ matrix
    assert clock.seconds()["product"] > 0.0
