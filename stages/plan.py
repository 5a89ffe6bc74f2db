"""How many replicas a load needs: a queueing simulation of what the benchmark measured, held against measured load.

One replica is one line of requests and one engine that answers them in batches, as `serving.batching` does: Poisson
arrivals, a batch of all that waits (up to the limit) whenever the engine is free, the time of a batch interpolated
between the measured batch sizes and spread as the benchmark's own p50 to p95. What HTTP, JSON and Python cost a
request is taken from the saturated part of `load.json`; without one it is left out, and the plan says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hstu.errors import InputError, UsageError

Floats = npt.NDArray[np.float64]
_REQUESTS = 10_000
_IDLE = 0.02  # of the time busy: whom that does not help, more replicas do not
_Z95 = 1.6449  # standard normal


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceTimes:
    """Measured milliseconds of a batch by its size, their spread (of the logarithm), and the cost around a request."""

    batches: tuple[int, ...]
    p50_ms: tuple[float, ...]
    spread: float
    around_ms: float  # 0: not measured

    def batch_ms(self, size: int) -> float:
        """Of a batch of this size, requests' own costs included."""
        return float(np.interp(size, self.batches, self.p50_ms)) + size * self.around_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is needed, and what it is expected to do."""

    qps: float
    p99_ms_wanted: float
    case: str
    engine: str
    replicas: int
    gpus: int
    memory_mib: int
    p50_ms: float
    p99_ms: float
    utilisation: float
    mean_batch: float
    around_ms: float
    checks: tuple[Mapping[str, float], ...]  # measured beside simulated, from load.json


def simulate(
    times: ServiceTimes, qps: float, *, max_batch: int = 32, wait_ms: float = 2.0, seed: int = 0
) -> tuple[Floats, float, float]:
    """Latencies float64 [n] in ms of one replica at `qps`, the share of time it is busy, and its mean batch."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1e3 / qps, _REQUESTS))
    spreads = rng.lognormal(0.0, times.spread, _REQUESTS)
    done = np.empty(_REQUESTS)
    free, first, busy, batches = 0.0, 0, 0.0, 0
    while first < _REQUESTS:
        begin = max(free, arrivals[first] + (wait_ms if arrivals[first] >= free else 0.0))
        size = min(max_batch, int(np.searchsorted(arrivals, begin, side="right")) - first)
        took = times.batch_ms(size) * spreads[first]
        free = begin + took
        done[first : first + size] = free
        busy, batches, first = busy + took, batches + 1, first + size
    return done - arrivals, busy / max(free - arrivals[0], 1e-9), _REQUESTS / batches


def make_plan(
    reports: Path,
    *,
    qps: float,
    p99_ms: float,
    case: str = "trained",
    engine: str | None = None,
    cache_mib: int = 256,
    most_busy: float = 0.8,
) -> Plan:
    """The fewest replicas whose p99 is as wanted while each is busy at most `most_busy` of the time.

    UsageError when not even many replicas help: a lone request takes longer than is wanted.
    """
    rows = _rows(reports / "benchmark.json", case, engine)
    around, checks_from = _around(reports / "load.json", case, rows)
    tails = [np.log(row["latency_ms"]["p95"] / row["latency_ms"]["p50"]) for row in rows]
    times = ServiceTimes(
        batches=tuple(row["batch"] for row in rows),
        p50_ms=tuple(row["latency_ms"]["p50"] for row in rows),
        spread=max(0.01, float(np.mean(tails)) / _Z95),
        around_ms=around,
    )
    replicas = max(1, int(qps * times.batch_ms(times.batches[-1]) / times.batches[-1] / 1e3))
    while True:
        latency, busy, batch = simulate(times, qps / replicas)
        if float(np.percentile(latency, 99)) <= p99_ms and busy <= most_busy:
            break
        if busy < _IDLE:
            raise UsageError(
                "no number of replicas answers that fast",
                got=f"p99 {np.percentile(latency, 99):.1f} ms of a replica that is busy {busy:.0%}",
                expected=f"{p99_ms} ms",
                fix="a faster engine, or a later p99",
            )
        replicas += max(1, replicas // 10)
    best = rows[0]
    memory = float(best["library_memory_mib"] or 0.0) + max(float(r["peak_memory_mib"] or 0.0) for r in rows)
    return Plan(
        qps=qps,
        p99_ms_wanted=p99_ms,
        case=case,
        engine=f"{best['backend']} {best['precision']}",
        replicas=replicas,
        gpus=replicas if best["backend"] == "tensorrt" else 0,
        memory_mib=int(replicas * (memory + cache_mib)),
        p50_ms=round(float(np.percentile(latency, 50)), 2),
        p99_ms=round(float(np.percentile(latency, 99)), 2),
        utilisation=round(busy, 3),
        mean_batch=round(batch, 2),
        around_ms=round(around, 3),
        checks=tuple(_check(times, one) for one in checks_from),
    )


def _rows(path: Path, case: str, engine: str | None) -> list[dict[str, Any]]:
    """Measured rows of one engine, smallest batch first; the fastest engine at the largest batch when none is named."""
    try:
        results = json.loads(path.read_text())["results"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: no benchmark to plan from ({error})", fix="python cli.py benchmark") from None
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        ours = row["runtime"] == "engine" and row["entry"] == "retrieve" and row["case"] == case
        if ours and row["latency_ms"] and row["thread_mode"] == "all" and row["occupancy"] == 1.0:
            found.setdefault(f"{row['backend']} {row['precision']}", []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: int(row["batch"]))
    if not found or (engine is not None and engine not in found):
        raise InputError(
            f"{path}: nothing measured of case {case!r}" + (f" on {engine!r}" if found else ""),
            expected=", ".join(found) or "results of an engine's retrieve",
        )
    return found[engine or min(found, key=lambda name: found[name][-1]["latency_ms"]["p50"])]


def _around(path: Path, case: str, rows: Sequence[Mapping[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds a request costs beside the engine, and the measured loads to check with; none for other models."""
    if not path.is_file() or case != "trained":
        return 0.0, []
    parts = [one["parts"] for one in json.loads(path.read_text())["bundles"].values()]
    saturated = [part["saturated"] for part in parts if "saturated" in part]
    if not saturated:
        return 0.0, []
    engine_ms = rows[-1]["latency_ms"]["p50"] / rows[-1]["batch"]
    around = max(0.0, 1e3 / float(saturated[-1]["answered_per_s"]) - engine_ms)
    return around, [part["steady"] for part in parts if "steady" in part]


def _check(times: ServiceTimes, measured: Mapping[str, Any]) -> dict[str, float]:
    latency, busy, _ = simulate(times, float(measured["answered_per_s"]))
    return {
        "qps": measured["answered_per_s"],
        "measured_p50_ms": measured["latency_ms"]["p50"],
        "simulated_p50_ms": round(float(np.percentile(latency, 50)), 2),
        "measured_p99_ms": measured["latency_ms"]["p99"],
        "simulated_p99_ms": round(float(np.percentile(latency, 99)), 2),
        "simulated_utilisation": round(busy, 3),
    }


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON."""
    return asdict(plan)


def render(plan: Plan) -> str:
    """The plan in words."""
    lines = [
        f"{plan.replicas} replicas of {plan.engine} ({plan.case})"
        f" for {plan.qps:g} requests/s within {plan.p99_ms_wanted:g} ms",
        f"  expected   p50 {plan.p50_ms} ms, p99 {plan.p99_ms} ms,"
        f" busy {plan.utilisation:.0%}, batches of {plan.mean_batch}",
        f"  memory     {plan.memory_mib} MiB in all, {plan.gpus} GPUs",
        f"  around     {plan.around_ms} ms of a request beside the engine"
        + ("" if plan.around_ms else ": not measured, so left out; run `python cli.py load`"),
    ]
    for check in plan.checks:
        lines.append(
            f"  check      at {check['qps']:g}/s measured p50 {check['measured_p50_ms']}"
            f" p99 {check['measured_p99_ms']} ms, simulated p50 {check['simulated_p50_ms']}"
            f" p99 {check['simulated_p99_ms']} ms"
        )
    return "\n".join(lines)
