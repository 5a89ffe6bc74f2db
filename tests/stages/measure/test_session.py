"""A session measures every runtime on every cell."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from stages.measure.case_models import bundle_files
from stages.measure.contestants import contestants
from stages.measure.session import Choice, Session
from tests.stages.measure.requests import CASE, EFFORT
from tests.stages.measure.sessions import SLOW_PEERS, TINY_BUNDLE, session


def test_a_session_measures_every_runtime_on_every_cell(measured: Session) -> None:
    runtimes = (("torch-eager", "fp32"), ("torch-eager", "bf16"), ("onnx-plain", "fp32"), ("engine", "fp32"))
    points = [(1, 1.0, "one"), (1, 1.0, "all"), (3, 1.0, "all"), (3, 0.5, "all")]
    assert [(r["runtime"], r["precision"], r["batch"], r["occupancy"], r["thread_mode"]) for r in measured.rows] == [
        (*runtime, *point) for point in points for runtime in runtimes
    ]
    for row in measured.rows:
        assert row["correct"] is True
        assert row["max_abs_error"] < (1e-5 if row["precision"] == "fp32" else 0.06)
        assert row["top10_overlap"] == 1.0 or row["precision"] != "fp32"
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"] <= row["latency_ms"]["p99"]
        assert row["throughput_rps"] > 0
        assert row["peak_memory_mib"] > 0
        assert row["ratio_ci95"][0] <= row["ratio_to_eager"] <= row["ratio_ci95"][1]
        assert row["share_of_ceiling"] is None or 0 < row["share_of_ceiling"] <= 1
        assert row["ceiling_gflops"] > 0
        assert row["ceiling_product"]
        assert row["memory_ratio"] > 0
        assert row["ratio_to_plain_ci95"][0] <= row["ratio_to_plain"] <= row["ratio_to_plain_ci95"][1]
    eager = {r["ratio_to_eager"] for r in measured.rows if (r["runtime"], r["precision"]) == ("torch-eager", "fp32")}
    assert eager == {1.0}
    assert {row["ratio_to_plain"] for row in measured.rows if row["runtime"] == "onnx-plain"} == {1.0}


def test_two_threads_are_compared_with_one_side_by_side(measured: Session) -> None:
    if os.cpu_count() == 1:
        pytest.skip("this machine has one core")
    assert [row["runtime"] for row in measured.scaling] == ["torch-eager", "engine"]
    for row in measured.scaling:
        assert row["scaling_ci95"][0] <= row["scaling"] <= row["scaling_ci95"][1]
        assert row["one_thread_ms"] > 0
        assert row["all_threads_ms"] > 0


def test_what_is_chosen_is_measured_and_what_is_left_out_is_said(artifacts: Path) -> None:
    runtimes = [c for c in contestants(bundle_files(artifacts / "bundle")) if c.runtime not in SLOW_PEERS]
    chosen = Session(
        case=CASE, config=TINY_BUNDLE, contestants=runtimes, effort=EFFORT, seed=0, on_cell=lambda _found: None,
        choice=Choice(entries=("retrieve",), batches=(3,), leave_out=("torch-eager bf16",)),
    )  # fmt: skip
    chosen.measure("one")
    assert chosen.rows == []
    chosen.measure("all")
    assert {(row["batch"], row["runtime"]) for row in chosen.rows} == {
        (3, "torch-eager"), (3, "onnx-plain"), (3, "engine"),
    }  # fmt: skip
    (skipped,) = chosen.skipped
    assert (skipped["runtime"], skipped["precision"]) == ("torch-eager", "bf16")
    assert "left out" in skipped["reason"]


def test_a_wrong_engine_is_found_and_never_timed(artifacts: Path, tmp_path: Path) -> None:
    broken = session(artifacts)
    wrong = dict(bundle_files(artifacts / "bundle").engines)
    folder = tmp_path / "wrong"
    folder.mkdir()
    for file in wrong["fp32"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = np.fromfile(folder / "weights.bin", dtype=np.float32)
    (weights * 1.01).tofile(folder / "weights.bin")
    broken.contestants = [
        dataclasses.replace(c, folder=folder) if c.runtime == "engine" else c for c in broken.contestants
    ]
    broken.measure("one")
    rows = {row["runtime"]: row for row in broken.rows if row["precision"] == "fp32"}
    assert not rows["engine"]["correct"]
    assert rows["engine"]["max_abs_error"] > 1e-5
    for name in ("latency_ms", "throughput_rps", "peak_memory_mib", "ratio_to_eager", "share_of_ceiling"):
        assert rows["engine"][name] is None
    assert rows["onnx-plain"]["latency_ms"] is not None
