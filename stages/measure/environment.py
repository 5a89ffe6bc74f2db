"""What of this machine matters to a measurement. No host name, no clock."""

from __future__ import annotations

import platform
from typing import Any

from stages.machine import BACKENDS, cpu_isa, cpu_model, gpus, installed, memory_bytes, num_cores


def describe_environment() -> dict[str, Any]:
    """CPU model, cores, instruction sets, memory, operating system, GPUs and the versions of what computes."""
    found = {name: installed(name) for name in BACKENDS}
    return {
        "cpu_model": cpu_model(),
        "architecture": platform.machine(),
        "cores": num_cores(),
        "instruction_sets": cpu_isa(),
        "memory_mib": memory_bytes()[0] // 2**20,
        "os": f"{platform.system()} {platform.release()}",
        "gpus": [gpu.name for gpu in gpus().devices],
        "python": platform.python_version(),
        "versions": {name: version for name, version in found.items() if version is not None},
    }
