"""Doctor: what is installed, which device is here, and what each backend can do on it.

A diagnosis must survive the illness: nothing here imports a heavy library, every backend is tried in a
child process of its own, and what cannot be found out is said to be so.
"""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages import backends, installed, machine
from stages.built_engines import BuiltEngine, built_engines
from stages.contract import write_report

PYTHON = (3, 11)


def examine(*, probes: bool = True, artifacts: Path | None = None) -> dict[str, Any]:
    """Everything found, as JSON-able values; `problems` lists what keeps this environment from working.

    Without `probes` no library is tried, only looked up: that takes a second instead of ten. Of the engines below
    `artifacts` it says what built them, and whether they were executed.
    """
    lock = installed.lock_in_use()
    packages = installed.locked_packages(lock) if lock else []
    interesting = [p for p in packages if p.name in installed.OF_INTEREST or p.status != "ok"]
    expected = installed.left_out()
    requirements = installed.broken_requirements()
    unexpected = [line for line in requirements if _missing(line) not in expected]
    found = backends.probe_backends() if probes else []
    gpus = machine.gpus()
    warnings = [*filter(None, [installed.foreign_kernels(), gpus.problem])]
    if lock is None:
        warnings.append("the folder locks/ is not here, so versions are not compared")
    differing = [p for p in packages if p.status != "ok"]
    problems = [f"{p.name}: {p.status}, installed {p.installed}, locked {p.locked}" for p in differing] + unexpected
    problems += [f"{b.name}: {b.problem}" for b in found if b.status == "broken"]
    if sys.version_info[:2] != PYTHON and lock is not None:
        problems.append(f"Python {platform.python_version()}; the locks are for {'.'.join(map(str, PYTHON))}")
    total, available = machine.memory_bytes()
    return {
        "healthy": not problems,
        "problems": problems,
        "warnings": warnings,
        "python": {"version": platform.python_version(), "prefix": sys.prefix},
        "lock": lock.name if lock else None,
        "packages": [{**asdict(p), "status": p.status} for p in interesting],
        "requirements": {
            "expected_missing": sorted(expected & {_missing(line) for line in requirements}),
            "broken": unexpected,
        },
        "device": {
            "cpu": {
                "model": machine.cpu_model(),
                "architecture": platform.machine(),
                "isa": machine.cpu_isa(),
                "cores": machine.num_cores(),
            },
            "memory_mib": {"total": total >> 20, "available": available >> 20},
            "disk_free_mib": machine.free_disk_bytes(Path.cwd()) >> 20,
            "gpus": [asdict(gpu) for gpu in gpus.devices],
            "driver": gpus.driver,
            "cuda": gpus.cuda,
        },
        "backends": [b.to_dict() for b in found],
        "engines": [asdict(engine) for engine in built_engines(artifacts)] if artifacts else [],
    }


def render(facts: dict[str, Any]) -> str:
    """The same for a person: device, backends, packages, and last what is wrong."""
    device = facts["device"]
    cpu, memory = device["cpu"], device["memory_mib"]
    lines = [
        f"device    {cpu['model']} ({cpu['architecture']}), {cpu['cores']} cores, {', '.join(cpu['isa'])}",
        f"          memory {memory['total']} MiB, {memory['available']} MiB available; "
        f"disk {device['disk_free_mib']} MiB free",
    ]
    for gpu in device["gpus"]:
        lines.append(f"          {gpu['name']}, sm {gpu['sm']}, {gpu['memory_mib']} MiB")
    lines.append(
        f"          driver {device['driver']}, CUDA {device['cuda']}" if device["gpus"] else "          no NVIDIA GPU"
    )
    lines.append("")
    for backend in facts["backends"]:
        lines.append(f"{backend['name']:<14}{backend['status']:<13}{backend['purpose']}")
        details = "; ".join(f"{key} {_text(value)}" for key, value in backend["facts"].items())
        lines += [f"{'':<27}{line}" for line in (details, backend.get("problem"), backend.get("fix")) if line]
    if facts["engines"]:
        lines += ["", *(f"engine {BuiltEngine(**engine)}" for engine in facts["engines"])]
    lines += ["", f"Python {facts['python']['version']} in {facts['python']['prefix']}, held against {facts['lock']}"]
    for package in facts["packages"]:
        note = "" if package["status"] == "ok" else f"  ← {package['status']}: the lock has {package['locked']}"
        lines.append(f"  {package['name']:<20}{package['installed'] or '-'}{note}")
    left_out = facts["requirements"]["expected_missing"]
    if left_out:
        lines.append(f"  left out on purpose (pip check names them): {', '.join(left_out)}")
    lines.append("")
    lines += [f"warning: {text}" for text in facts["warnings"]]
    lines += [f"problem: {text}" for text in facts["problems"]]
    lines.append("all is well" if facts["healthy"] else "fix:     make environment")
    return "\n".join(lines)


def write_machine_facts(path: Path) -> dict[str, Any]:
    """Write `machine.machine_facts()` at `path`, for DVC to compare; the same machine gives the same bytes."""
    facts = machine.machine_facts()
    write_report(path, facts)
    return facts


def _missing(line: str) -> str | None:
    match = re.search(r"requires (\S+), which is not installed", line)
    return match.group(1) if match else None


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
