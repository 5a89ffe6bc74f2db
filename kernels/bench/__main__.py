"""Checks and measures every compiled kernel on the GPU that is here, and writes one JSON.

    python -m kernels.bench --kernels artifacts/build-kernels --cutlass artifacts/cutlass --out reports/gpu/h200.json

Needs torch, triton (for its version) and numpy; nothing of the rest of this project. The tasks run in a child process,
one after another, each written to disk as it ends; a task that crashes or hangs takes the child with it, is marked, and
the next child goes on with the rest. Everything ends within --seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STALL_S = 90.0  # how long a child may be silent before its first task; a task says for itself
REFRESH_S = 15.0  # how old the report may be, should this process be killed


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when every check passed (a dry run: nothing is missing), 1 otherwise, 2 where it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kernels", type=Path, default=Path("artifacts/build-kernels"), help="what build-kernels wrote"
    )
    parser.add_argument("--cutlass", type=Path, help="folder of CUTLASS libraries (python -m kernels.cutlass_build)")
    parser.add_argument("--out", type=Path, help="the report to write")
    parser.add_argument("--seconds", type=float, default=440.0, help="when everything must have ended")
    parser.add_argument("--section", action="append", help="only these sections; may be given several times")
    parser.add_argument("--only", metavar="REGEX", help="only tasks whose name it is found in")
    parser.add_argument("--interpret", action="store_true", help="no GPU: Triton's interpreter, small checks alone")
    parser.add_argument(
        "--dry-run", action="store_true", help="no GPU: list the tasks, and say what they would miss; nothing runs"
    )
    parser.add_argument("--sm", type=int, default=90, help="with --dry-run: for which SM")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # the child: when to stop, seconds since 1970
    given = parser.parse_args(argv)
    if given.dry_run:
        from kernels.bench.worker import rehearse

        return rehearse(given)
    if given.out is None:
        parser.error("the following arguments are required: --out")
    if given.until is not None:
        from kernels.bench.worker import work

        return work(given, record_of(given.out))
    return supervise(given, list(argv if argv is not None else sys.argv[1:]))


def record_of(out: Path) -> Path:
    """The lines from which a report is put together."""
    return out.with_suffix(".jsonl")


def supervise(given: argparse.Namespace, argv: list[str]) -> int:
    """Run children until the work or the time is over, then write the report."""
    record = record_of(given.out)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    until = time.time() + given.seconds
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if given.interpret:
        environment["TRITON_INTERPRET"] = "1"
    code, restarts = 1, 0
    while time.time() < until - 5 and restarts < 40:
        child = subprocess.Popen(
            [sys.executable, "-m", str(__package__), *argv, "--until", str(until)], env=environment
        )  # fmt: skip
        code = _watch(child, given.out, until)
        if code in (0, 2):
            break
        restarts += 1
        write(given.out, record, finished=False)
    report = write(given.out, record, finished=code == 0)
    sys.stderr.write(summary(report))
    if code == 2:
        return 2
    return 0 if report["checks"] and all(check.get("ok") for check in report["checks"].values()) else 1


def _watch(child: subprocess.Popen[bytes], out: Path, until: float) -> int:
    """The child's exit code; it is killed when it stalls or when the time is over. The report is kept up to date."""
    record, written = record_of(out), time.time()
    while True:
        try:
            return child.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            if time.time() - written > REFRESH_S:
                write(out, record, finished=False)
                written = time.time()
            last = record.stat().st_mtime if record.is_file() else time.time()
            if time.time() > until + 5 or time.time() - last > patience(record):
                child.kill()
                child.wait()
                return -9


def patience(record: Path) -> float:
    """How many seconds the task that runs may take: what the last line says."""
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    try:
        return float(json.loads(lines[-1])["stall_s"]) if lines else STALL_S
    except (json.JSONDecodeError, KeyError):
        return STALL_S


def read(record: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], dict[str, Any]]]:
    """The device's facts, and each task's result or error by key; a task that began and never ended has crashed."""
    device: dict[str, Any] = {}
    results: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the last line of a child that was killed
            continue
        if "device" in entry:
            device = entry["device"]
        elif "result" in entry:
            results[tuple(entry["key"])] = entry["result"]
        elif "error" in entry:
            results[tuple(entry["key"])] = {"error_message": entry["error"]}
        else:
            results[tuple(entry["key"])] = {"error_message": "crashed or hung, and took its process with it"}
    return device, results


def write(out: Path, record: Path, *, finished: bool) -> dict[str, Any]:
    """The report, whole at any moment, from the lines written so far."""
    device, results = read(record)
    sections: dict[str, dict[str, Any]] = {name: {} for name in ("ceiling", "check", "time", "cutlass", "rival")}
    sweep: dict[str, dict[str, float]] = {}
    errors: dict[str, str] = {}
    for key, result in results.items():
        if "error_message" in result:
            errors[" ".join(key)] = result["error_message"]
            if key[0] == "check":
                sections["check"][key[1]] = {"ok": False}
        elif key[0] == "sweep":
            sweep.setdefault(key[1], {})[key[2]] = result["us"]
        else:
            sections[key[0]][key[1]] = result
    report = {
        "schema": 1, "finished": finished, "device": device, "ceilings": sections["ceiling"],
        "checks": sections["check"], "timings": sections["time"], "cutlass": sections["cutlass"], "sweep": sweep,
        "rivals": sections["rival"], "errors": errors,
    }  # fmt: skip
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(out)
    return report


def summary(report: dict[str, Any]) -> str:
    """A short table for people, the last thing a run says."""
    lines = [f"{report['device'].get('device', 'no device')}, finished: {report['finished']}"]
    lines += [f"ceiling {name}: {c['value']:.4g} {c['unit']}" for name, c in report["ceilings"].items()]
    passed = sum(bool(check.get("ok")) for check in report["checks"].values())
    lines.append(f"checks passed: {passed} of {len(report['checks'])}")
    lines += [f"  FAILED {name}: {check}" for name, check in report["checks"].items() if not check.get("ok")]
    for name, timing in {**report["timings"], **report["cutlass"]}.items():
        share = timing["share_of_ceiling"]
        target = f"  target {timing['target_us']:.0f}" if "target_us" in timing else ""
        lines.append(
            f"{timing['us']:10.1f} us {timing['tflops']:7.1f} TFLOP/s {timing['tb_s']:6.2f} TB/s"
            f" {100 * share if share else 0:5.1f} %  {name}{target}"
        )
    for kernel, times in report["sweep"].items():
        best = min(times, key=lambda config: times[config])
        lines.append(f"best of {len(times)} configs of {kernel}: {best} {times[best]:.1f} us")
    lines += [
        f"rival {n}: "
        + ", ".join(f"{k} {v['us']:.1f} us" if "us" in v else f"{k} {next(iter(v))}" for k, v in r.items())
        for n, r in report["rivals"].items()
        if r
    ]
    lines += [f"error {name}: {text.splitlines()[0]}" for name, text in report["errors"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
