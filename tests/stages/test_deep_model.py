"""Twelve trained layers through the real pipeline: every precision holds its quality there too, not on two alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hstu.tolerances import TOLERANCES
from stages.contract import Workspace, execute
from stages.pipeline import stage

PARAMS = Path(__file__).parents[2] / "params.yaml"
USERS = 1000
LOSS = 0.0075  # of HR@10, relative: with so few users and so short a training this is two hits


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The reference model six times as deep, trained for three epochs, exported and rewritten."""
    folder = tmp_path_factory.mktemp("deep")
    values: dict[str, dict[str, Any]] = yaml.safe_load(PARAMS.read_text())
    values["checkpoint"] |= {
        "reference_num_layers": 12,
        "reference_epochs": 3,
        "reference_learning_rate": 0.003,
    }
    # 64 columns are too few to be fast, and how fast they are is not the question.
    values["build-engine"] |= {"evaluation_histories": USERS, "max_quality_loss": LOSS, "int8_force": True}
    made = Workspace(artifacts=folder / "artifacts", reports=folder / "reports", values=values)
    for name in ("prepare-data", "checkpoint", "export-onnx", "surgery"):
        execute(stage(name), made)
    return made


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("precision", "backend"),
    [("fp32", "openvino"), ("bf16", "openvino"), ("int8", "openvino"), ("fp16", "onnxruntime"),
     ("bf16", "onnxruntime"), ("int8", "onnxruntime")],
)  # fmt: skip
def test_twelve_layers_pass_every_gate(workspace: Workspace, precision: str, backend: str) -> None:
    execute(stage("build-engine"), workspace, overrides={"precision": precision, "backend": backend})
    written = workspace.reports / "metrics" / f"build-engine-{precision}-{backend}.json"
    figures, limits = json.loads(written.read_text()), TOLERANCES[precision]
    assert figures["histories"] == USERS
    assert figures["embedding_cosine"]["mean"] >= limits.min_mean_cosine
    assert figures["top10_overlap"] >= limits.min_top10_overlap
    assert figures["hr_at_10"]["relative_loss"] <= LOSS
    for form, least in (("fp32", limits.min_mean_cosine), ("bf16", 0.9995), ("int8", 0.995)):
        assert figures["cache"][form]["mean_cosine"] >= min(least, limits.min_mean_cosine), form
