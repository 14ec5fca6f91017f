"""The threads of the compiled functions: torch's where they can be had, and any other team."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from pyeditfast import reference
from pyeditfast.extension import extension_status, load_extension, start_of_torch_threads

extension = load_extension()
pytestmark = pytest.mark.skipif(extension is None, reason=extension_status())

SHAPE = (1031, 517)
WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
START = ctypes.CFUNCTYPE(None, WORK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


@pytest.fixture
def share():
    """Return a function that lends threads, for the test."""
    yield extension.share_threads
    extension.share_threads(start_of_torch_threads())


def mask(threads):
    out = torch.empty(SHAPE, dtype=torch.bool)
    extension.random_mask(
        out=out.data_ptr(), numel=out.numel(), seed=3, ratio=0.2, offset=0, threads=threads
    )
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch has other runtimes")
def test_torch_lends_its_threads():
    assert start_of_torch_threads() != 0
    assert extension_status().endswith("it runs on torch's threads")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_of_its_own(share, threads):
    share(0)
    assert torch.equal(mask(threads), reference.random_mask(3, 0.2, SHAPE))


@pytest.mark.parametrize("given", [1, 2, 9])
def test_a_team_of_another_size_than_was_asked_for(share, given):
    asked = []

    def start(body, data, threads, flags):
        asked.append((threads, flags))
        for _ in range(given):
            body(data)

    team = START(start)
    share(ctypes.cast(team, ctypes.c_void_p).value)
    assert torch.equal(mask(4), reference.random_mask(3, 0.2, SHAPE))
    assert asked == [(4, 0)]


def test_little_work_wakes_nobody(share):
    def start(body, data, threads, flags):
        raise AssertionError

    team = START(start)
    share(ctypes.cast(team, ctypes.c_void_p).value)
    out = torch.empty(7, dtype=torch.bool)
    extension.random_mask(out=out.data_ptr(), numel=7, seed=3, ratio=0.2, offset=0, threads=4)
    assert torch.equal(out, reference.random_mask(3, 0.2, (7,)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own():
    program = """
import os, signal, torch
from pyeditfast.ops import random_mask
torch.set_num_threads(2)
torch.zeros(4_000_000).add_(1)
def drawn():
    return random_mask(3, 0.2, (1031, 517)).numpy().tobytes()
before = drawn()
process = os.fork()
if process == 0:
    # Where it waits for threads that are not there.
    signal.alarm(60)
    os._exit(0 if drawn() == before else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
