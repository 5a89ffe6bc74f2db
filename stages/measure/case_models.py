"""The files of a case's model: the bundle's own, or a model of random weights compiled as the bundle was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hstu
import stages
from hstu.artifact import encode_json
from hstu.config import HSTUConfig
from hstu.errors import ArtifactError, GateError
from serving.engine import read_spec
from stages.contract import Workspace, execute, say
from stages.measure.runtimes import ModelFiles

FOLDER = ".cases"  # below the artifacts: compiled once, kept until what compiles them changes
SEED = 20
LOG_USERS, LOG_ITEMS = 100, 100  # the checkpoint stage wants a prepared log; a random model has no use for it
CALIBRATION, EVALUATION = 64, 96  # drawn histories: these models are large, and a gate runs each one through eager


def bundle_files(bundle: Path) -> ModelFiles:
    """Where everything stands in a bundle."""
    engines = sorted(path for path in (bundle / "engines").iterdir() if path.is_dir())
    return ModelFiles(
        checkpoint=bundle, onnx=bundle / "onnx", engines={path.name: path for path in engines}, bundle=bundle
    )


def random_files(name: str, config: HSTUConfig, bundle: Path, cases: Path) -> tuple[ModelFiles, dict[str, str]]:
    """The files of a case's model of random weights, compiled below `cases` unless they stand there already.

    Also says which of the bundle's engines were refused for this model, and why. Every stage gets the
    parameters that the bundle's lineage names.
    """
    engines = [name for name, path in bundle_files(bundle).engines.items() if read_spec(path).executed]
    recorded = ("prepare-data", "checkpoint", "export-onnx", "surgery", *(f"build-engine-{e}" for e in engines))
    lineage = {stage: _lineage(bundle, stage) for stage in recorded}
    recipe = {"config": config.to_dict(), "seed": SEED, "lineage": lineage, "code": _code_digest()}
    folder = cases / name / hashlib.sha256(encode_json(recipe)).hexdigest()
    done = folder / "done.json"
    if not done.is_file():
        shutil.rmtree(cases / name, ignore_errors=True)
        say(f"benchmark: compiling the model of case {name}")
        refused = _compile(config, lineage, engines, folder)
        done.write_bytes(encode_json({"refused": refused}))
    refused = json.loads(done.read_bytes())["refused"]
    files = ModelFiles(
        checkpoint=folder / "checkpoint",
        onnx=folder / "export-onnx",
        engines={name: folder / "build-engine" / name for name in engines if name not in refused},
        bundle=None,
    )
    return files, refused


def _compile(
    config: HSTUConfig, lineage: Mapping[str, Mapping[str, Any]], engines: list[str], folder: Path
) -> dict[str, str]:
    """Run the pipeline up to its engines on random weights; the refused engines by name with the gate's words."""
    from stages.pipeline import stage  # the pipeline knows the benchmark, so the benchmark asks for it only now

    weights = folder / "weights"
    weights.mkdir(parents=True)
    write_random_model(config, weights)
    values: dict[str, dict[str, Any]] = {name: dict(params) for name, params in lineage.items()}
    values["prepare-data"] |= {
        "source": "reference",
        "path": None,
        "reference_users": LOG_USERS,
        "reference_items": LOG_ITEMS,
    }
    values["checkpoint"] |= {
        "source": "huggingface",
        "path": str(weights),
        "event_log": "none",
        "calibration_histories": CALIBRATION,
        "evaluation_histories": EVALUATION,
    }
    values["build-engine"] = {}
    workspace = Workspace(artifacts=folder, reports=folder / "reports", values=values)
    for name in ("prepare-data", "checkpoint", "export-onnx", "surgery"):
        execute(stage(name), workspace)
    shutil.rmtree(weights)
    refused = {}
    for name in engines:
        try:
            execute(stage("build-engine"), workspace, overrides=lineage[f"build-engine-{name}"])
        except GateError as error:
            say(f"benchmark: {name} is refused for this model and not measured: {error}")
            refused[name] = str(error)
    return refused


def write_random_model(config: HSTUConfig, folder: Path) -> None:
    """A Hugging Face style folder of random weights in which every table and bias matters.

    Projections keep the scale of their input, √D times an item embedding is of unit size as in a trained
    model, tables and biases are a third of that.
    """
    import torch

    from hstu.checkpoints.huggingface import save_pretrained
    from hstu.model import HSTU

    generator = torch.Generator().manual_seed(SEED)
    model = HSTU(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("item_embedding"):
                scale = 1.0 / config.item_scale
            elif parameter.dim() == 2 and not name.endswith("embedding.weight"):
                scale = parameter.shape[-1] ** -0.5
            else:
                scale = 0.3
            parameter.normal_(0.0, scale, generator=generator)
        model.item_embedding.weight[0] = 0.0
    save_pretrained(model, folder)


def _lineage(bundle: Path, name: str) -> dict[str, Any]:
    path = bundle / "lineage" / f"{name}.json"
    try:
        return dict(json.loads(path.read_text())["params"])
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{path}: not the manifest of a stage ({error})", fix="run the bundle stage again"
        ) from None


def _code_digest() -> str:
    """A hash of the code that compiles: a model compiled by other code must not be measured as if by this."""
    digest = hashlib.sha256()
    for package in (hstu, stages):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()
