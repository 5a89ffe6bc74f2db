"""This process as Linux counts it: the memory it takes, and how long its threads waited for a core."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
TASKS = Path("/proc/self/task")


def resident_mib() -> float:
    """Memory resident now, in MiB."""
    return _status("VmRSS")


def peak_mib() -> float:
    """The most memory that was resident since the process began or `reset_peak` was called, in MiB."""
    return _status("VmHWM")


def reset_peak() -> None:
    """From now on `peak_mib` counts anew (Linux: writing 5 to clear_refs resets the high-water mark)."""
    CLEAR_REFS.write_text("5")


def give_back_memory() -> None:
    """Memory that was freed is the system's again, though the allocator is told to keep it (glibc's malloc_trim)."""
    ctypes.CDLL(None).malloc_trim(0)


def core_wait_s() -> float:
    """Seconds that the threads of this process were ready to run while other work had the cores, since they began.

    The second field of schedstat. On a machine that does nothing else it hardly grows.
    """
    waited = 0
    for task in TASKS.iterdir():
        try:
            waited += int((task / "schedstat").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            continue
    return waited / 1e9


def wait_until_idle(limit_s: float) -> bool:
    """Whether all threads but this one sleep; returns as soon as they do, or after `limit_s` with False.

    A thread pool goes on spinning for some milliseconds after its work is done, and would take a core from the
    process whose turn is next.
    """
    deadline = time.monotonic() + limit_s
    while any(_is_running(task) for task in TASKS.iterdir() if task.name != str(threading.get_native_id())):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def _is_running(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return False


def _status(name: str) -> float:
    match = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{STATUS} has no {name}")
    return int(match[1]) / 1024
