"""From a cell's measurements to the rows of benchmark.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from hstu.config import HSTUConfig
from stages.measure.ceiling import least_memory_mib
from stages.measure.contestants import PADDED, PLAIN, Contestant
from stages.measure.interleave import Found, Measurement
from stages.measure.statistics import latency_ms, median_with_interval, significant

TIMED = (  # null until answers were right
    "latency_ms", "throughput_rps", "peak_memory_mib", "library_memory_mib", "memory_ratio", "ratio_to_eager",
    "ratio_ci95", "ratio_to_plain", "ratio_to_plain_ci95", "ratio_to_padded", "ratio_to_padded_ci95",
    "share_of_ceiling", "ceiling_gflops", "ceiling_product", "core_wait_share",
)  # fmt: skip


def result_rows(
    found: Found, config: HSTUConfig, *, threads: int, weights_bytes: int, baselines_mib: dict[Contestant, float]
) -> list[dict[str, Any]]:
    """A row for every runtime of the cell, eager PyTorch's first; timings are null where answers were wrong."""
    return [
        _row(found, item, config, threads, weights_bytes, baselines_mib[item.contestant]) for item in found.measurements
    ]


def _row(
    found: Found, item: Measurement, config: HSTUConfig, threads: int, weights_bytes: int, baseline_mib: float
) -> dict[str, Any]:
    cell, check = found.cell, item.check
    row: dict[str, Any] = {
        "case": cell.case,
        "entry": cell.entry,
        "runtime": item.contestant.runtime,
        "backend": item.contestant.backend,
        "precision": item.contestant.precision,
        "batch": cell.batch,
        "length": cell.length,
        "new_events": cell.new_events,
        "occupancy": cell.occupancy,
        "thread_mode": cell.thread_mode,
        "threads": threads,
        "correct": check.correct,
        "max_abs_error": significant(check.max_abs_error, 3),
        "top10_overlap": None if check.top10_overlap is None else significant(check.top10_overlap),
        "rounds": len(item.medians),
        "requests": len(item.seconds),
    }
    row |= dict.fromkeys(TIMED)
    if item.seconds:
        eager = found.measurements[0]
        row |= {
            "latency_ms": latency_ms(item.seconds),
            "throughput_rps": significant(cell.batch * len(item.seconds) / sum(item.seconds)),
            "peak_memory_mib": round(item.peak_mib, 1),
            "library_memory_mib": round(baseline_mib, 1),
            "core_wait_share": round(max(item.wait_share, eager.wait_share), 3),
        }
        row["ratio_to_eager"], row["ratio_ci95"] = _ratio(item, eager)
        plain = [other for other in found.measurements if other.contestant.runtime == PLAIN and other.seconds]
        if plain:
            row["ratio_to_plain"], row["ratio_to_plain_ci95"] = _ratio(item, plain[0])
        padded = [other for other in found.measurements if _is_padded(other, item) and other.seconds]
        if padded:
            row["ratio_to_padded"], row["ratio_to_padded_ci95"] = _ratio(item, padded[0])
        if cell.entry == "retrieve":
            least = least_memory_mib(config, weights_bytes, batch=cell.batch, length=cell.length)
            row["memory_ratio"] = significant(item.peak_mib / least, 3)
        row |= _share(found, item)
    return row


def _is_padded(other: Measurement, item: Measurement) -> bool:
    """Whether the other is the same engine, but with padding."""
    theirs, ours = other.contestant, item.contestant
    same = (theirs.backend, theirs.precision) == (ours.backend, ours.precision)
    return same and theirs.runtime == PADDED and ours.runtime == "engine"


def _ratio(item: Measurement, other: Measurement) -> tuple[float, list[float]]:
    ratio, interval = median_with_interval(item.ratios(other))
    return ratio, list(interval)


def _share(found: Found, item: Measurement) -> dict[str, Any]:
    """What the least work of a request needs at the fastest product's rate, over what the request takes; medians.

    Nothing is faster than the fastest product, so a share above one says that other work slowed the products more than
    the runtime (on two threads one busy core does): it is no share, and is left out.
    """
    rates = found.gflops.get(item.contestant.precision)
    if not found.flops or not rates:
        return {}
    ceiling = float(np.median(rates))
    rate = found.flops / float(np.median(item.seconds)) / 1e9
    return {
        "share_of_ceiling": significant(rate / ceiling, 3) if rate <= ceiling else None,
        "ceiling_gflops": significant(ceiling),
        "ceiling_product": found.products[item.contestant.precision],
    }
