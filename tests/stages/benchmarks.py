"""Benchmark reports with chosen figures, for the tests of what reads them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hstu.artifact import encode_json
from stages.gate import GateParams

ENVIRONMENT = {
    "cpu_model": "Test CPU 9000",
    "architecture": "x86_64",
    "cores": 2,
    "instruction_sets": ["avx2", "avx512f", "avx512_bf16"],
    "memory_mib": 8192,
    "os": "Linux 6",
    "gpus": [],
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "onnxruntime": "1.31.1"},
    "calibration_ms": 10.0,
}
RUNTIMES = (  # runtime, backend, precision, ratio to eager
    ("torch-eager", "torch", "fp32", 1.0),
    ("onnx-plain", "onnxruntime", "fp32", 1.3),
    ("engine", "onnxruntime", "fp32", 1.8),
    ("engine", "onnxruntime", "int8", 3.5),
)
EAGER_MS = {1: 10.0, 8: 50.0, 32: 200.0}
PARAMS = GateParams(
    cases=("trained",),
    max_slowdown=0.2,
    run_noise=0.05,
    other_machine_noise=0.15,
    max_quality_drop=0.01,
    max_overlap_drop=0.05,
    max_error_growth=3.0,
    max_memory_growth=0.25,
    max_size_growth=0.05,
    noticed_slowdown=0.03,
    openings=6,
    rounds=20,
)
METRICS = {
    "checkpoint": {"hr_at_10": 0.49, "ndcg_at_10": 0.24, "popularity_hr_at_10": 0.04, "auc_engagement": 0.59},
    "build-engine-int8": {
        "embedding_cosine": {"min": 0.9985, "mean": 0.9999},
        "top10_overlap": 0.97,
        "hr_at_10": {"engine": 0.489, "fp32_eager": 0.49, "relative_loss": 0.002},
        "max_abs_error": {"user_embedding": 0.01},
        "bytes": 1_000_000,
    },
}


def row(runtime: str, backend: str, precision: str, ratio: float, batch: int, mode: str) -> dict[str, Any]:
    """One result, fast by `ratio`; its interval is 3 % wide on either side."""
    p50 = EAGER_MS[batch] / ratio
    return {
        "case": "trained", "entry": "retrieve", "runtime": runtime, "backend": backend, "precision": precision,
        "batch": batch, "length": 50, "new_events": 0, "occupancy": 1.0,
        "thread_mode": mode, "threads": 1 if mode == "one" else 2,
        "correct": True, "max_abs_error": 0.0 if runtime == "torch-eager" else 3e-7 if precision == "fp32" else 0.01,
        "top10_overlap": 1.0 if precision == "fp32" else 0.97,
        "latency_ms": {"p50": p50, "p95": p50 * 1.1, "p99": p50 * 1.2},
        "throughput_rps": 1000 * batch / p50, "peak_memory_mib": 100.0, "library_memory_mib": 50.0,
        "memory_ratio": 1.15, "ratio_to_eager": ratio, "ratio_ci95": [ratio * 0.97, ratio * 1.03],
        "ratio_to_plain": ratio / 1.3, "ratio_to_plain_ci95": [ratio / 1.3 * 0.97, ratio / 1.3 * 1.03],
        "share_of_ceiling": 0.5, "ceiling_gflops": 100.0, "ceiling_product": "OpenVINO 512x64x256",
        "core_wait_share": 0.0, "rounds": 20, "requests": 40,
    }  # fmt: skip


def benchmark() -> dict[str, Any]:
    """A benchmark of the case `trained`: every runtime at batch 1 on one thread and 1, 8, 32 on all."""
    cells = [(1, "one"), (1, "all"), (8, "all"), (32, "all")]
    return {
        "schema": 1,
        "bundle": "b" * 64,
        "environment": dict(ENVIRONMENT),
        "cases": {
            "trained": {
                "summary": "the bundle's own checkpoint",
                "model": {
                    "num_layers": 2, "embedding_dim": 64, "num_heads": 2, "num_items": 3000, "max_history": 50,
                },
                "left_out": "",
                "compiled": None,
            }
        },
        "results": [row(*runtime, batch, mode) for batch, mode in cells for runtime in RUNTIMES],
        "scaling": [
            {
                "case": "trained", "entry": "retrieve", "runtime": "engine", "backend": "onnxruntime",
                "precision": "fp32", "batch": 1, "length": 50, "threads": 2, "one_thread_ms": 5.0,
                "all_threads_ms": 2.7, "scaling": 1.85, "scaling_ci95": [1.8, 1.9], "core_wait_share": 0.0,
                "rounds": 20,
            }
        ],
        "skipped": [],
    }  # fmt: skip


def scaled(report: dict[str, Any], factor: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """The report with every runtime but eager faster by `factor(row)`, interval and latency with it."""

    def change(old: dict[str, Any]) -> dict[str, Any]:
        by = 1.0 if old["runtime"] == "torch-eager" else factor(old)
        return old | {
            "ratio_to_eager": old["ratio_to_eager"] * by,
            "ratio_ci95": [value * by for value in old["ratio_ci95"]],
            "latency_ms": {name: value / by for name, value in old["latency_ms"].items()},
        }

    return report | {"results": [change(old) for old in report["results"]]}


def noisy(report: dict[str, Any], rng: np.random.Generator, deviation: float) -> dict[str, Any]:
    """The report as another run would have it: every ratio multiplied by log-normal noise."""
    return scaled(report, lambda _: math.exp(rng.normal(0.0, deviation)))


def write(folder: Path, report: dict[str, Any], metrics: dict[str, Any] | None = None) -> Path:
    """`benchmark.json` and `metrics/` in `folder`; returns the path of the former."""
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_bytes(encode_json(report))
    for name, values in (METRICS if metrics is None else metrics).items():
        (folder / "metrics" / f"{name}.json").write_bytes(encode_json(values))
    return folder / "benchmark.json"
