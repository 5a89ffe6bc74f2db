"""Memory and waiting, as Linux counts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np

from stages.measure import process


def test_the_peak_of_memory_is_seen_after_it_has_gone() -> None:
    process.reset_peak()
    before = process.peak_mib()
    block = np.ones(100 * 2**20 // 8)
    del block
    assert 90 < process.peak_mib() - before < 140
    process.reset_peak()
    assert process.peak_mib() - before < 60


def test_waiting_for_a_core_is_seen() -> None:
    """Two processes on one core: each waits about half of the time, alone hardly any of it."""
    cores = os.sched_getaffinity(0)
    code = "while True: pass"
    try:
        os.sched_setaffinity(0, {min(cores)})
        rival = subprocess.Popen([sys.executable, "-c", code])  # inherits the one core
        try:
            started, before = time.perf_counter(), process.core_wait_s()
            while time.perf_counter() - started < 0.5:
                pass
            share = (process.core_wait_s() - before) / (time.perf_counter() - started)
        finally:
            rival.kill()
            rival.wait()
    finally:
        os.sched_setaffinity(0, cores)
    assert 0.2 < share < 2.0


def test_a_spinning_thread_is_waited_for() -> None:
    assert process.wait_until_idle(1.0)
    code = """
import sys, threading, time
from stages.measure import process
stop = time.monotonic() + 0.3
def spin():
    while time.monotonic() < stop:
        pass
thread = threading.Thread(target=spin)
thread.start()
print(process.wait_until_idle(0.05), process.wait_until_idle(5.0), time.monotonic() >= stop)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
