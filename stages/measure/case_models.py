"""The files of a case's model: the bundle's own, or a model of random weights compiled as the bundle was."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import stages
from hstu.artifact import MANIFEST, encode_json
from hstu.config import HSTUConfig
from hstu.errors import ArtifactError, GateError
from serving.engine import BACKENDS, read_spec
from stages.contract import Workspace, execute, say
from stages.measure.cases import Case
from stages.measure.contestants import ModelFiles

FOLDER = ".cases"  # below the artifacts: compiled once, kept until what compiles them changes
SEED = 20
LOG_USERS, LOG_ITEMS = 100, 100  # the checkpoint stage wants a prepared log; a random model has no use for it
HISTORIES = 32  # drawn for calibration, and as many for evaluation
PADDED = "padded"  # folder of engines built a second time, without packing
PACKAGES = ("stages", "serving", "hstu", "kernels")
KERNEL_SUFFIXES = (".cpp", ".h")


def bundle_files(bundle: Path) -> ModelFiles:
    """Where everything stands in a bundle."""
    engines = sorted(path for path in (bundle / "engines").iterdir() if path.is_dir())
    return ModelFiles(
        checkpoint=bundle, onnx=bundle / "onnx", engines={path.name: path for path in engines}, bundle=bundle
    )


def random_files(case: Case, bundle: Path, cases: Path) -> tuple[ModelFiles, dict[str, str]]:
    """The files of a case's model of random weights, compiled below `cases` as far as they do not stand there already.

    Also says which of the bundle's engines were refused for this model, and why. Every stage gets the
    parameters that the bundle's lineage names. Whatever is interrupted goes on where it was.
    """
    assert case.config is not None
    there = bundle_files(bundle).engines
    engines = [name for name in case.engines if name in there and read_spec(there[name]).executed]
    recorded = ("prepare-data", "checkpoint", "export-onnx", "surgery", *(f"build-engine-{e}" for e in engines))
    lineage = {stage: _lineage(bundle, stage) for stage in recorded}
    recipe = {
        "config": case.config.to_dict(),
        "histories": [HISTORIES, case.calibration, case.evaluation],
        "seed": SEED,
        "lineage": lineage,
        "code": compiler_digest(),
    }
    folder = cases / case.name / hashlib.sha256(encode_json(recipe)).hexdigest()
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other)  # compiled by other code or from other parameters
    refused = _compile(case, lineage, engines, folder)
    files = ModelFiles(
        checkpoint=folder / "checkpoint",
        onnx=folder / "export-onnx",
        engines={name: folder / "build-engine" / name for name in engines if name not in refused},
        padded={name: folder / PADDED / "build-engine" / name for name in _padded(case, lineage, engines)},
        bundle=None,
    )
    return files, refused


def _padded(case: Case, lineage: Mapping[str, Mapping[str, Any]], engines: list[str]) -> list[str]:
    """The engines that are built a second time with padding: what packing is measured against."""
    packed = [name for name in engines if lineage[f"build-engine-{name}"].get("rows", "padded") != "padded"]
    return [name for name in packed if name in case.padded]


def _compile(case: Case, lineage: Mapping[str, Mapping[str, Any]], engines: list[str], folder: Path) -> dict[str, str]:
    """Run the pipeline up to its engines on random weights; the refused engines by name with the gate's words."""
    from stages.pipeline import stage  # the pipeline knows the benchmark, so the benchmark asks for it only now

    weights = folder / "weights"
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
        "calibration_histories": HISTORIES,
        "evaluation_histories": HISTORIES,
    }
    values["build-engine"] = {}
    few = {"calibration_histories": case.calibration, "evaluation_histories": case.evaluation}
    few |= {"int8_force": True}  # how fast it is, is what will be measured
    workspace = Workspace(artifacts=folder, reports=folder / "reports", values=values)
    for name in ("prepare-data", "checkpoint", "export-onnx", "surgery"):
        if (folder / name / MANIFEST).is_file():
            continue
        say(f"benchmark: {name} of case {case.name}")
        if name == "checkpoint":
            assert case.config is not None
            weights.mkdir(parents=True, exist_ok=True)
            write_random_model(case.config, weights)
        execute(stage(name), workspace)
        shutil.rmtree(weights, ignore_errors=True)
    refused = {}
    for name in engines:
        refusal = folder / f"{name}.refused"
        if refusal.is_file():
            refused[name] = refusal.read_text()
        elif not (folder / "build-engine" / name / MANIFEST).is_file():
            say(f"benchmark: engine {name} of case {case.name}")
            try:
                execute(stage("build-engine"), workspace, overrides={**lineage[f"build-engine-{name}"], **few})
            except GateError as error:
                say(f"benchmark: {name} is refused for this model and not measured: {error}")
                refusal.write_text(str(error))
                refused[name] = str(error)
    for name in _padded(case, lineage, engines):
        if not (folder / PADDED / "build-engine" / name / MANIFEST).is_file():
            say(f"benchmark: engine {name} of case {case.name}, padded")
            (folder / PADDED).mkdir(exist_ok=True)
            for need in ("checkpoint", "surgery"):
                (folder / PADDED / need).unlink(missing_ok=True)
                (folder / PADDED / need).symlink_to(Path("..") / need)
            beside = Workspace(artifacts=folder / PADDED, reports=folder / PADDED / "reports", values=values)
            execute(
                stage("build-engine"),
                beside,
                overrides={**lineage[f"build-engine-{name}"], **few, "rows": "padded"},
            )
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


def compiler_digest() -> str:
    """A hash of the code that compiles: a model compiled by other code must not be measured as if by this."""
    root = Path(stages.__file__).parents[1]
    digest = hashlib.sha256()
    for path in compiler_sources(root):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def compiler_sources(root: Path) -> list[Path]:
    """Every module of ours that the compiling stages and the engines import, at whatever depth, and the kernels."""
    kernels = (root / "kernels").rglob("*")
    found = {path for path in kernels if path.suffix in KERNEL_SUFFIXES}
    compiling = ("prepare_data", "checkpoint", "export_onnx", "surgery", "build_engine")
    passes = (f"stages.passes.{path.stem}" for path in (root / "stages" / "passes").glob("*.py"))  # imported by name
    left = [*(f"stages.{name}" for name in compiling), *passes, *BACKENDS.values()]
    seen = set(left)
    while left:
        path = root / Path(*left.pop().split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.is_file():
            continue  # a name that was imported from a module
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            new = {name for name in names if name.partition(".")[0] in PACKAGES} - seen
            seen |= new
            left += sorted(new)
    return sorted(found)
