"""gpu-check: the whole of it rehearsed on ONNX Runtime, and every step's own words where there is no GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hstu.artifact import Artifact
from stages.contract import Workspace
from stages.golden import write_golden
from stages.gpu_check import gpu_check, render
from stages.parameters import read_params

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workspace(checkpoint: Artifact, surgered: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("gpu-check")
    for name, artifact in (("checkpoint", checkpoint), ("surgery", surgered)):
        shutil.copytree(artifact.path, root / "artifacts" / name)
    values = read_params(ROOT / "params.yaml")
    values["build-engine"] |= {"timing_caches": None}
    shutil.copytree(checkpoint.path, root / "bundle", ignore=shutil.ignore_patterns("manifest.json"))
    write_golden(checkpoint, root / "bundle" / "golden", num_histories=4)
    return Workspace(artifacts=root / "artifacts", reports=root / "reports", values=values)


def test_the_rehearsal_builds_compares_and_times(workspace: Workspace) -> None:
    bundle = workspace.artifacts.parent / "bundle"
    report, path = gpu_check(workspace, bundle, backend="onnxruntime", precisions=["fp32"])
    assert report.passed, render(report, path)
    told = json.loads(path.read_bytes())
    found = {step["name"]: step["found"] for step in told["steps"]}
    assert found["fp32 retrieve: golden answers"]["min_cosine"] > 0.99999
    assert found["fp32 rank: time"]["users_1"]["p50_ms"] > 0
    assert found["fp32 extend: time"]["users_4"]["rounds"] == 50
    assert found["fp32: model repository"]["models"] == ["hstu_extend", "hstu_rank", "hstu_retrieve"]


def test_a_wrong_answer_fails_its_step_and_the_rest_runs(workspace: Workspace, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(workspace.artifacts.parent / "bundle", bundle)
    import numpy as np

    outputs = dict(np.load(bundle / "golden" / "outputs.npz"))
    outputs["rank/task_scores"] = outputs["rank/task_scores"] + 0.1
    np.savez(bundle / "golden" / "outputs.npz", **outputs)
    report, path = gpu_check(workspace, bundle, backend="onnxruntime", precisions=["fp32"])
    failed = [step.name for step in report.steps if not step.ok]
    assert failed == ["fp32 rank: golden answers"]
    assert "FAILED  fp32 rank: golden answers: answers differ" in render(report, path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_every_step_says_what_it_misses(workspace: Workspace, tmp_path: Path) -> None:
    there = Workspace(artifacts=workspace.artifacts, reports=tmp_path, values=workspace.values)
    report, path = gpu_check(there, workspace.artifacts.parent / "bundle", precisions=["fp16", "int8"])
    assert [step.ok for step in report.steps] == [False] * len(report.steps)
    assert len(report.steps) == 1 + 3 * (3 + 3 * 4)  # fp16, fp16 with the plugin, and the other
    assert "TensorRT is not installed" in str(report.steps[0].error)
    assert all(step.error for step in report.steps)
    assert json.loads(path.read_bytes())["steps"][1]["name"] == "fp16: build"
