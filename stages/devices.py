"""GPUs that an estimate can be made for, and this machine's own memory.

Source: NVIDIA's datasheets of the parts named (dense rates, without sparsity; memory as sold, in 10⁹ bytes).
A processor's arithmetic rate depends on clocks and cores, so this machine has none here: measure it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hstu.errors import UsageError
from stages.machine import cpu_model, memory_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Where a model would run. Rates are peaks: tera-operations a second by precision, gigabytes a second of memory."""

    name: str
    memory_bytes: int
    bandwidth_gb_s: float | None = None
    peak_tops: Mapping[str, float] | None = None
    sm: str | None = None
    source: str = ""


def _gpu(
    name: str, memory_gb: int, bandwidth_gb_s: float, sm: str, fp32: float, half: float, int8: float, source: str
) -> Device:
    return Device(
        name=name,
        memory_bytes=memory_gb * 10**9,
        bandwidth_gb_s=bandwidth_gb_s,
        peak_tops=MappingProxyType({"fp32": fp32, "fp16": half, "bf16": half, "int8": int8}),
        sm=sm,
        source=source,
    )


GPUS: Mapping[str, Device] = MappingProxyType(
    {
        "a10": _gpu("NVIDIA A10", 24, 600, "8.6", 31.2, 125, 250, "NVIDIA A10 datasheet, 2021"),
        "a100-40": _gpu("NVIDIA A100 40GB SXM", 40, 1555, "8.0", 19.5, 312, 624, "NVIDIA A100 datasheet, 2021"),
        "a100-80": _gpu("NVIDIA A100 80GB SXM", 80, 2039, "8.0", 19.5, 312, 624, "NVIDIA A100 datasheet, 2021"),
        "h100": _gpu("NVIDIA H100 SXM", 80, 3350, "9.0", 67, 989, 1979, "NVIDIA H100 datasheet, 2023"),
        "h200": _gpu("NVIDIA H200 SXM", 141, 4800, "9.0", 67, 989, 1979, "NVIDIA H200 datasheet, 2024"),
        "l4": _gpu("NVIDIA L4", 24, 300, "8.9", 30.3, 121, 242, "NVIDIA L4 datasheet, 2023"),
        "l40s": _gpu("NVIDIA L40S", 48, 864, "8.9", 91.6, 362, 733, "NVIDIA L40S datasheet, 2023"),
    }
)
HERE = "here"


def device(name: str = HERE) -> Device:
    """The GPU of that name, or for "here" this machine's processor; UsageError naming the known ones."""
    if name == HERE:
        return Device(name=f"this machine ({cpu_model()})", memory_bytes=memory_bytes()[0], source="the system")
    if name.lower() not in GPUS:
        close = difflib.get_close_matches(name.lower(), GPUS, n=1)
        raise UsageError(
            f"there is no entry for the GPU {name!r}",
            expected=", ".join([HERE, *GPUS]),
            fix=f"did you mean {close[0]!r}?" if close else "choose one of similar memory",
        )
    return GPUS[name.lower()]
