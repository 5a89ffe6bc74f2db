"""This process's memory, as Linux counts it."""

from __future__ import annotations

import re
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_mib() -> float:
    """Memory resident now, in MiB."""
    return _status("VmRSS")


def peak_mib() -> float:
    """The most memory that was resident since the process began or `reset_peak` was called, in MiB."""
    return _status("VmHWM")


def reset_peak() -> None:
    """From now on `peak_mib` counts anew (Linux: writing 5 to clear_refs resets the high-water mark)."""
    CLEAR_REFS.write_text("5")


def _status(name: str) -> float:
    match = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{STATUS} has no {name}")
    return int(match[1]) / 1024
