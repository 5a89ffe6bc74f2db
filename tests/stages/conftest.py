"""Artifacts of the tiny model that several stages' tests start from, made once a session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from hstu.artifact import Artifact, write_manifest
from stages import export_onnx
from tests.models import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A checkpoint artifact of the tiny random model (`tests.models.TINY`)."""
    return write_checkpoint(tmp_path_factory.mktemp("artifacts") / "checkpoint")


@pytest.fixture(scope="session")
def exported(checkpoint: Artifact) -> Artifact:
    """The export-onnx artifact of `checkpoint`."""
    return export(checkpoint, checkpoint.path.parent / "export-onnx")


def export(checkpoint: Artifact, folder: Path, *, opset: int = 20) -> Artifact:
    """Run export-onnx into `folder`, which then is an artifact."""
    folder.mkdir(parents=True)
    params = export_onnx.ExportOnnxParams(opset=opset, check_seed=0)
    export_onnx.run(params, {"checkpoint": checkpoint}, folder)
    inputs: Mapping[str, str] = {"checkpoint": checkpoint.id}
    return write_manifest(folder, stage="export-onnx", params={"opset": opset}, inputs=inputs, toolchain={})
