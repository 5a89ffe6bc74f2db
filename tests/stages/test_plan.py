from __future__ import annotations

import json

import numpy as np
import pytest

from hstu.errors import InputError, UsageError
from stages import plan

TIMES = plan.ServiceTimes(batches=(1, 32), p50_ms=(2.0, 2.0 + 31 * 0.5), spread=0.05, around_ms=0.0)


def row(batch: int, p50: float, **changes):
    values = {"runtime": "engine", "entry": "retrieve", "case": "trained", "thread_mode": "all", "occupancy": 1.0}
    values |= {"backend": "openvino", "precision": "fp32", "batch": batch, "library_memory_mib": 200.0}
    return values | {"peak_memory_mib": 40.0, "latency_ms": {"p50": p50, "p95": p50 * 1.1}} | changes


def write(folder, rows, load=None):
    (folder / "benchmark.json").write_text(json.dumps({"results": rows}))
    if load is not None:
        (folder / "load.json").write_text(json.dumps({"bundles": {"b": {"parts": load}}}))


def test_a_single_server_without_batches_is_the_queue_of_the_books():
    exponential = plan.ServiceTimes(batches=(1, 2), p50_ms=(10.0, 10.0), spread=1e-9, around_ms=0.0)
    latency, busy, _ = plan.simulate(exponential, 50.0, max_batch=1, wait_ms=0.0)
    # M/D/1 at utilisation 1/2 (Pollaczek-Khinchine): mean wait = ρ / (2 (1 - ρ)) · service time
    assert busy == pytest.approx(0.5, rel=0.05)
    assert latency.mean() == pytest.approx(10.0 + 0.5 / (2 * 0.5) * 10.0, rel=0.05)


def test_batches_grow_with_the_load_and_latency_stays_bounded():
    quiet, _, alone = plan.simulate(TIMES, 20.0)
    loaded, busy, together = plan.simulate(TIMES, 1200.0)
    assert alone < 1.2 < 3 < together
    assert busy < 1.0
    assert np.percentile(quiet, 99) < np.percentile(loaded, 99) < 200


def test_more_load_needs_more_replicas_and_memory(tmp_path):
    write(tmp_path, [row(1, 2.0), row(32, 17.5), row(1, 1.0, case="other")])
    small = plan.make_plan(tmp_path, qps=100, p99_ms=50)
    large = plan.make_plan(tmp_path, qps=20_000, p99_ms=50)
    assert small.replicas == 1
    assert 10 <= large.replicas <= 40
    assert large.p99_ms <= 50
    assert large.memory_mib == large.replicas * (240 + 256)
    assert small.gpus == 0
    assert "not measured" in plan.render(small)


def test_a_measured_load_adds_what_a_request_costs_and_is_checked(tmp_path):
    load = {
        "saturated": {"answered_per_s": 500.0},
        "steady": {"answered_per_s": 120.0, "latency_ms": {"p50": 5.0, "p99": 20.0}},
    }
    write(tmp_path, [row(1, 2.0), row(32, 16.0)], load)
    found = plan.make_plan(tmp_path, qps=1000, p99_ms=100)
    assert found.around_ms == pytest.approx(1.5)
    assert found.replicas >= 3
    (check,) = found.checks
    assert check["measured_p99_ms"] == 20.0
    assert "check" in plan.render(found)


def test_what_cannot_be_planned_is_said(tmp_path):
    with pytest.raises(InputError, match=r"cli\.py benchmark"):
        plan.make_plan(tmp_path, qps=1, p99_ms=1)
    write(tmp_path, [row(1, 20.0), row(32, 100.0)])
    with pytest.raises(InputError, match="nope"):
        plan.make_plan(tmp_path, qps=1, p99_ms=100, engine="nope")
    with pytest.raises(UsageError, match="no number of replicas"):
        plan.make_plan(tmp_path, qps=1, p99_ms=5)
