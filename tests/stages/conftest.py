"""Artifacts of the tiny model that several stages' tests start from, made once a session."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from hstu.artifact import Artifact, encode_json, write_manifest
from hstu.model import HSTU
from stages import export_onnx, surgery
from stages.measure.session import Session
from tests.models import TINY_RESEARCH, random_model, tiny_config, write_checkpoint
from tests.stages.bundles import rewrite, write_artifacts
from tests.stages.measure.sessions import session


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A checkpoint artifact of the tiny random model (`tests.models.TINY`)."""
    return write_checkpoint(tmp_path_factory.mktemp("artifacts") / "checkpoint")


@pytest.fixture(scope="session")
def exported(checkpoint: Artifact) -> Artifact:
    """The export-onnx artifact of `checkpoint`."""
    return export(checkpoint, checkpoint.path.parent / "export-onnx")


@pytest.fixture(scope="session")
def surgered(exported: Artifact) -> Artifact:
    """The surgery artifact of `exported`, every pass applied."""
    return operate(exported, exported.path.parent / "surgery")


@pytest.fixture(
    scope="session",
    params=[TINY_RESEARCH, tiny_config(num_layers=1, num_heads=1, num_items=9)],
    ids=["research", "one-layer"],
)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[HSTU, Artifact]:
    """A model of another shape than `TINY` and its export-onnx artifact, at opset 21."""
    model = random_model(request.param, seed=5)
    folder = tmp_path_factory.mktemp("variant")
    return model, export(write_checkpoint(folder / "checkpoint", model), folder / "export-onnx", opset=21)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts whose bundle is of one tiny layer, with an fp32 engine; not to be changed."""
    folder = tmp_path_factory.mktemp("benchmark") / "artifacts"
    # In a process of its own: what vLLM has traced in this one makes torch.export fail for like shapes.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        bundle = pool.submit(write_artifacts, folder).result()
    description = {"version": "1.2.3", "default_engine": "fp32", "engines": {"fp32": {}}}
    (bundle / "bundle.json").write_bytes(encode_json(description))
    rewrite(bundle)
    return folder


@pytest.fixture(scope="session")
def measured(artifacts: Path) -> Session:
    """A session over `artifacts` that has measured on one thread, on all, and what all are worth."""
    done = session(artifacts)
    done.measure("one")
    done.measure("all")
    done.measure("scaling")
    return done


def export(checkpoint: Artifact, folder: Path, *, opset: int = 20) -> Artifact:
    """Run export-onnx into `folder`, which then is an artifact."""
    folder.mkdir(parents=True)
    params = export_onnx.ExportOnnxParams(opset=opset, check_seed=0)
    export_onnx.run(params, {"checkpoint": checkpoint}, folder)
    inputs: Mapping[str, str] = {"checkpoint": checkpoint.id}
    return write_manifest(folder, stage="export-onnx", params={"opset": opset}, inputs=inputs, toolchain={})


def operate(exported: Artifact, folder: Path, passes: tuple[str, ...] = tuple(surgery.MODULES)) -> Artifact:
    """Run surgery into `folder`, which then is an artifact."""
    folder.mkdir(parents=True)
    params = surgery.SurgeryParams(passes=passes, check_seed=0)  # type: ignore[arg-type]
    surgery.run(params, {"export-onnx": exported}, folder)
    inputs = {"export-onnx": exported.id}
    return write_manifest(folder, stage="surgery", params={"passes": passes}, inputs=inputs, toolchain={})
