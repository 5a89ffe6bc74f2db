"""The stage: its parameters, what it keeps of earlier runs, and the report that it publishes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.artifact import Artifact, encode_json, open_artifact
from hstu.errors import GateError, ParameterError
from stages import benchmark
from stages.benchmark import merge
from stages.contract import Workspace, execute
from stages.measure.session import Session
from tests.stages.bundles import rewrite
from tests.stages.measure.sessions import TINY_BUNDLE

PARAMS = {
    "cases": ["trained"], "threads": ["one"], "cell_seconds": 0.01, "min_rounds": 2, "max_rounds": 3,
    "first_answer_s": 60.0, "compile_batches": [], "compile_threads": ["all"], "seed": 0,
    "entries": [], "batches": [], "occupancies": [], "leave_out": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ["huge"]}, "no case 'huge'"),
        ({"cases": []}, "at least one"),
        ({"cases": ["small", "small"]}, "none twice"),
        ({"threads": ["two"]}, "threads"),
        ({"cell_seconds": 0.0}, "cell_seconds"),
        ({"min_rounds": 5}, "min_rounds <= max_rounds"),
        ({"compile_batches": [0]}, "compile_batches"),
        ({"batches": [0]}, "batches"),
        ({"entries": ["search"]}, "entries"),
        ({"seed": -1}, "seed"),
        ({"surprise": 1}, "unknown parameter 'surprise'"),
    ],
)
def test_parameters_out_of_range_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    workspace = Workspace(artifacts=tmp_path, reports=tmp_path, values={"benchmark": PARAMS | changes})
    with pytest.raises(ParameterError, match=message):
        execute(benchmark.STAGE, workspace)


def report_of(session: Session, bundle: Artifact) -> dict[str, Any]:
    cases = {"trained": {"summary": "", "left_out": "", "model": session.config.to_dict(), "compiled": None}}
    environment = {"cpu_model": "x", "cores": 2, "calibration_ms": 1.0}
    report = {"schema": 1, "bundle": bundle.id, "environment": environment, "cases": cases}
    return report | {"results": session.rows, "scaling": session.scaling, "skipped": []}


def test_cases_measured_before_stay_while_bundle_and_machine_are_the_same(
    measured: Session, artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = report_of(measured, open_artifact(artifacts / "bundle"))
    rows = [row | {"case": "small"} for row in now["results"]]
    earlier = now | {
        "cases": {"small": {}},
        "results": rows,
        "environment": now["environment"] | {"calibration_ms": 9.0},
    }
    assert merge(now, None) == now
    merged = merge(now, earlier)
    assert set(merged["cases"]) == {"trained", "small"}
    assert len(merged["results"]) == 2 * len(rows)
    assert merge(now, merged) == merged
    for other in ({"bundle": "0" * 64}, {"environment": {"cpu_model": "y"}}, {"schema": 0}):
        assert merge(now, earlier | other) == now
    assert "dropping earlier results of small" in capsys.readouterr().err


def test_cells_measured_before_stay_beside_those_of_the_same_model(measured: Session, artifacts: Path) -> None:
    """A case may be measured piece by piece; a piece measured again takes the place of the earlier one, whole."""
    whole = report_of(measured, open_artifact(artifacts / "bundle"))
    one = whole | {"results": [r for r in whole["results"] if r["thread_mode"] == "one"], "scaling": []}
    rest = whole | {"results": [r for r in whole["results"] if r["thread_mode"] == "all"]}
    merged = merge(rest, one)
    assert merged["results"] == whole["results"]
    assert merged["scaling"] == whole["scaling"]
    fewer = whole | {"results": [r for r in whole["results"] if r["runtime"] != "engine"], "scaling": []}
    assert merge(fewer, whole)["results"] == fewer["results"]
    anew = rest | {"cases": {"trained": rest["cases"]["trained"] | {"compiled": "by other code"}}}
    assert merge(anew, one)["results"] == rest["results"]


@pytest.mark.slow
def test_the_stage_measures_peers_and_slates_and_publishes_its_report(artifacts: Path, tmp_path: Path) -> None:
    from serving.vllm_plugin.tokenizer import write_tokenizer

    artifacts = Path(shutil.copytree(artifacts, tmp_path / "artifacts"))
    bundle = artifacts / "bundle"
    write_tokenizer(bundle, TINY_BUNDLE)
    rewrite(bundle)
    gate_values = {"cases": ["trained"], "max_slowdown": 0.2, "run_noise": 0.05, "other_machine_noise": 0.15,
                   "max_quality_drop": 0.01, "max_overlap_drop": 0.05, "max_error_growth": 3.0,
                   "max_memory_growth": 0.25, "max_size_growth": 0.05, "noticed_slowdown": 0.03, "openings": 6,
                   "rounds": 20}  # fmt: skip
    params = PARAMS | {"threads": ["one", "all"], "compile_batches": [1], "first_answer_s": 240.0}
    workspace = Workspace(
        artifacts=artifacts, reports=tmp_path / "reports", values={"benchmark": params, "gate": gate_values}
    )
    artifact = execute(benchmark.STAGE, workspace)
    report = json.loads((tmp_path / "reports" / "benchmark.json").read_bytes())
    assert report == json.loads(artifact.file("benchmark.json").read_bytes())
    assert report["skipped"] == []
    assert {row["runtime"] for row in report["results"]} == {
        "torch-eager", "torch-compile", "onnx-plain", "openvino-plain", "engine", "vllm",
    }  # fmt: skip
    slates = [row for row in report["results"] if row["entry"] == "generate"]
    assert [(row["runtime"], row["batch"]) for row in slates] == [
        (runtime, batch) for batch in (1, 8, 32) for runtime in ("torch-eager", "vllm")
    ]
    assert all(row["correct"] and row["top10_overlap"] == 1.0 for row in slates)
    assert (tmp_path / "reports" / "report.html").is_file()
    assert (tmp_path / "reports" / "plots" / "latency.csv").is_file()
    assert (tmp_path / "reports" / "metrics" / "benchmark.json").is_file()


def test_a_report_with_wrong_results_is_published_and_fails(measured: Session, artifacts: Path, tmp_path: Path) -> None:
    report = report_of(measured, open_artifact(artifacts / "bundle"))
    report["environment"] |= benchmark_environment()
    report["results"] = [dict(row) for row in report["results"]]
    timings = ("latency_ms", "throughput_rps", "ratio_to_eager", "ratio_ci95", "peak_memory_mib", "share_of_ceiling")
    report["results"][3] |= dict.fromkeys(timings) | {"correct": False, "max_abs_error": 0.25}
    folder = tmp_path / "benchmark"
    folder.mkdir()
    (folder / "benchmark.json").write_bytes(encode_json(report))
    artifact = Artifact(path=folder, manifest={"stage": "benchmark", "files": {"benchmark.json": {}}}, id="0" * 64)
    workspace = Workspace(artifacts=artifacts, reports=tmp_path / "reports", values={})
    workspace.reports.mkdir()
    with pytest.raises(GateError, match=r"(?s)1 of 16 results are wrong.*engine fp32: max abs error 0.25") as raised:
        benchmark.publish(artifact, workspace)
    assert raised.value.exit_code == 5
    assert json.loads((workspace.reports / "benchmark.json").read_bytes())["results"][3]["correct"] is False
    assert "1 of 16 results are wrong" in (workspace.reports / "report.html").read_text()


def benchmark_environment() -> dict[str, Any]:
    from stages.measure.environment import describe_environment

    return describe_environment()


def test_the_environment_names_no_host_and_no_path() -> None:
    environment = benchmark_environment()
    text = json.dumps(environment)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["cores"] >= 1
