"""A whole small bundle with its upstream artifacts: real weights, a real ONNX Runtime engine, real golden answers."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hstu.artifact import MANIFEST, Artifact, encode_json, open_artifact, write_manifest
from hstu.manifest import CHECKSUM, manifest_checksum
from stages import export_onnx
from stages.export_onnx import ExportOnnxParams
from stages.golden import write_golden
from tests.models import random_model, tiny_config, write_checkpoint

ENGINE = {
    "backend": "onnxruntime",
    "precision": "fp32",
    "entries": {"retrieve": "retrieve.onnx", "extend": "extend.onnx"},
}

CONFIG = tiny_config(num_layers=1, tasks=(), head_dim=0)  # one layer and no ranking: exported in seconds

PARAMS: dict[str, dict[str, Any]] = {
    "prepare-data": {"source": "reference"},
    "checkpoint": {"source": "reference"},
    "build-engine": {"precision": "fp32", "max_abs_error": 2e-5, "min_cosine": None},
    "bundle": {"version": "0.1.0"},
}


def write_artifacts(artifacts: Path) -> Path:
    """Every artifact from prepare-data to a bundle below `artifacts`; returns the bundle's folder."""
    made: dict[str, Artifact] = {}

    def finish(name: str, *inputs: str, **platform: Any) -> Artifact:
        stage = name.partition("/")[0]
        made[name] = write_manifest(
            artifacts / name,
            stage=stage,
            params=PARAMS.get(stage, {}),
            inputs={parent: made[parent].id for parent in inputs},
            toolchain={},
            platform=platform or None,
        )
        return made[name]

    (artifacts / "prepare-data").mkdir(parents=True)
    (artifacts / "prepare-data" / "summary.json").write_text("{}\n")
    finish("prepare-data")
    write_checkpoint(artifacts / "checkpoint", random_model(CONFIG))
    (artifacts / "checkpoint" / MANIFEST).unlink()
    checkpoint = finish("checkpoint", "prepare-data")
    (artifacts / "export-onnx").mkdir()
    export_onnx.run(ExportOnnxParams(opset=20, check_seed=0), {"checkpoint": checkpoint}, artifacts / "export-onnx")
    finish("export-onnx", "checkpoint")
    for name, executed in (("fp32", True), ("fp32-tensorrt-rtx", False)):
        folder = artifacts / "build-engine" / name
        shutil.copytree(artifacts / "export-onnx", folder)
        (folder / MANIFEST).unlink()
        spec = ENGINE | {"executed": executed} | ({} if executed else {"backend": "tensorrt-rtx"})
        (folder / "engine.json").write_bytes(encode_json(spec))
        finish(f"build-engine/{name}", "checkpoint", "export-onnx", executed=executed)
    bundle = artifacts / "bundle"
    bundle.mkdir()
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        shutil.copyfile(artifacts / "checkpoint" / name, bundle / name)
    copy(artifacts / "export-onnx", bundle / "onnx")
    for name in ("fp32", "fp32-tensorrt-rtx"):
        copy(artifacts / "build-engine" / name, bundle / "engines" / name)
    platform = {"product": "ONNX Runtime", "version": version("onnxruntime"), "device": "cpu"}
    description = {
        "version": PARAMS["bundle"]["version"],
        "default_engine": "fp32",
        "engines": {
            "fp32": platform | {"backend": "onnxruntime", "executed": True},
            "fp32-tensorrt-rtx": platform | {"backend": "tensorrt-rtx", "executed": False},
        },
        "checkpoint": {"metrics": {"hr_at_10": 0.5}},
    }
    (bundle / "bundle.json").write_bytes(encode_json(description))
    write_golden(checkpoint, bundle / "golden", num_histories=6)
    (bundle / "lineage").mkdir()
    for name, artifact in made.items():
        shutil.copyfile(artifact.path / MANIFEST, bundle / "lineage" / f"{name.replace('/', '-')}.json")
    finish("bundle", *made)
    return bundle


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(MANIFEST))


def rewrite(folder: Path, **changes: Any) -> Artifact:
    """The artifact's manifest made true again after its files were changed, or with other values."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    fresh = write_manifest(
        folder, **{key: manifest[key] for key in ("stage", "params", "inputs", "toolchain")} | changes
    )
    return open_artifact(fresh.path)


def checksummed(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest with the checksum that belongs to it."""
    return encode_json({**manifest, CHECKSUM: manifest_checksum(manifest)})
