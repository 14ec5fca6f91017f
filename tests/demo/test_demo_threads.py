"""The choice between one thread and all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from pyeditfast.demo import threads as subject
from pyeditfast.demo.threads import TRIALS, WARM_UP, QuickerThreads

TRIED = WARM_UP + 2 * TRIALS


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_used(
    monkeypatch: pytest.MonkeyPatch, steps: int, seconds: Callable[[int, int], float]
) -> list[int]:
    """Return each step's threads when step ``i`` with ``n`` threads takes ``seconds(i, n)``."""
    clock = [0.0]
    used = []
    with monkeypatch.context() as patch, QuickerThreads() as threads:
        patch.setattr(subject.time, "perf_counter", lambda: clock[0])
        for step in range(steps):
            with threads.step():
                used.append(torch.get_num_threads())
                clock[0] += seconds(step, used[-1])
    return used


@pytest.mark.parametrize("quicker", [1, 2])
def test_the_quicker_number_is_kept_and_the_old_one_restored(
    monkeypatch: pytest.MonkeyPatch, two_threads: None, quicker: int
) -> None:
    def seconds(step: int, threads: int) -> float:
        # The first steps say nothing, and one slow step in the trial is no reason.
        if step < WARM_UP or step == WARM_UP + quicker % 2:
            return 100.0
        return 1.0 if threads == quicker else 2.0

    used = threads_used(monkeypatch, TRIED + 5, seconds)
    assert used[WARM_UP:TRIED] == [2, 1] * TRIALS
    assert used[TRIED:] == [quicker] * 5
    assert torch.get_num_threads() == 2


def test_all_threads_are_given_up_when_they_become_slow(
    monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    def seconds(step: int, threads: int) -> float:
        return (0.5 if step < TRIED + 10 else 9.0) if threads == 2 else 1.0

    used = threads_used(monkeypatch, TRIED + 20, seconds)
    assert used[TRIED : TRIED + 10] == [2] * 10
    assert used[TRIED + 10 + TRIALS :] == [1] * (10 - TRIALS)


def test_the_number_is_restored_after_an_error(two_threads: None) -> None:
    def fail() -> None:
        with QuickerThreads() as threads:
            for _ in range(WARM_UP + 2):
                with threads.step():
                    pass
            assert torch.get_num_threads() == 1
            raise KeyError("step")

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == 2


def test_a_single_thread_stays_one(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda number: pytest.fail("was set"))
        with QuickerThreads() as threads:
            for _ in range(TRIED + 1):
                with threads.step():
                    assert torch.get_num_threads() == 1
