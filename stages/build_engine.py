"""build-engine: the rewritten graphs at one precision, on one backend, kept only when they pass their gates."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hstu.artifact import Artifact, encode_json
from hstu.config import HSTUConfig
from hstu.signature import EntryName, entry_names
from hstu.tolerances import TOLERANCES, Tolerance
from stages.contract import Outcome, Stage, say
from stages.parameters import require

if TYPE_CHECKING:
    from hstu.data.histories import Histories
    from serving.engine import EngineSpec
    from stages.engine_targets import Target
    from stages.precision.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildEngineParams:
    """See params.yaml for the meaning of each and its unit."""

    precision: Literal["fp32", "fp16", "bf16", "int8"]
    backend: Literal["auto", "onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"]
    float_keep_wide: tuple[str, ...]
    int8_keep_wide: tuple[str, ...]
    calibration_histories: int
    calibration_method: Literal["max", "percentile", "mse"]
    calibration_percentile: float
    evaluation_histories: int
    max_abs_error: float | None
    min_cosine: float | None
    min_top10_overlap: float | None
    max_quality_loss: float | None
    tf32: bool
    optimization_level: int
    workspace_mib: int

    def __post_init__(self) -> None:
        for name in ("calibration_histories", "evaluation_histories"):
            require(getattr(self, name) >= 2, f"build-engine.{name}: too few", got=getattr(self, name), expected=">= 2")
        require(50.0 <= self.calibration_percentile <= 100.0, "build-engine.calibration_percentile: out of range",
                got=self.calibration_percentile, expected="50..100")  # fmt: skip
        for name in ("max_abs_error", "min_cosine", "min_top10_overlap", "max_quality_loss"):
            value = getattr(self, name)
            require(value is None or 0.0 <= value <= 1.0, f"build-engine.{name}: out of range",
                    got=value, expected="0..1, or null for the precision's own")  # fmt: skip
        require(0 <= self.optimization_level <= 5, "build-engine.optimization_level: out of range",
                got=self.optimization_level, expected="0..5")  # fmt: skip
        require(self.workspace_mib >= 1, "build-engine.workspace_mib: must be positive",
                got=self.workspace_mib, expected=">= 1")  # fmt: skip

    @property
    def limits(self) -> Tolerance:
        """The gate: the precision's tolerances, with what these parameters change."""
        names = ("max_abs_error", "min_cosine", "min_top10_overlap", "max_quality_loss")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(TOLERANCES[self.precision], **changes)


def variant(params: BuildEngineParams) -> str:
    """The artifact's name: the precision, and the backend when one was asked for."""
    return params.precision if params.backend == "auto" else f"{params.precision}-{params.backend}"


def run(params: BuildEngineParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Write an engine folder (`serving.engine`) with `recipe.json`: what computes in which type, and why.

    Raises MissingBackendError when the backend is not here, GateError with the figures when the engine is
    not good enough, ParameterError when `*_keep_wide` names no linear of the model.
    """
    from hstu.data.histories import Histories
    from stages.engine_targets import choose
    from stages.precision.recipe import Recipe

    target, why = choose(params.backend)
    version = target.require()
    say(f"build-engine: {params.precision} for {target.product} {version} ({why})")
    surgery, checkpoint = inputs["surgery"], inputs["checkpoint"]
    calibration = Histories.load(checkpoint.file("calibration.npz"))
    recipe = Recipe(
        precision=params.precision,
        float_keep_wide=params.float_keep_wide,
        int8_keep_wide=params.int8_keep_wide,
        method=params.calibration_method,
        percentile=params.calibration_percentile,
    )
    calibration = calibration.select(range(min(params.calibration_histories, len(calibration))))
    facts = _write_models(surgery.path, folder, target, recipe, calibration)
    spec = _compile(params, folder, target)
    (folder / "recipe.json").write_bytes(encode_json({**facts, **_calibration_facts(checkpoint, calibration)}))
    evaluation = Histories.load(checkpoint.file("evaluation.npz"))
    evaluation = evaluation.select(range(min(params.evaluation_histories, len(evaluation))))
    if target.executed:
        figures = _gate(params, folder, checkpoint, evaluation)
    else:  # what cannot run here is judged by its ONNX files, on ONNX Runtime
        with tempfile.TemporaryDirectory() as scratch:
            stand_in = Path(scratch)
            onnxruntime = choose("onnxruntime")[0]
            _write_models(surgery.path, stand_in, onnxruntime, recipe, calibration)
            _compile(params, stand_in, onnxruntime)
            figures = _gate(params, stand_in, checkpoint, evaluation)
    platform = {
        "backend": target.backend,
        "product": target.product,
        "version": version,
        "device": _device(target),
        "executed": target.executed,
        "figures_from": target.product if target.executed else "the same ONNX on ONNX Runtime",
        "precision": params.precision,
        "chosen_because": why,
    }
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Outcome(metrics={**figures, "bytes": size, "entries": sorted(spec.entries)}, platform=platform)


def _write_models(source: Path, folder: Path, target: Target, recipe: Recipe, calibration: Histories) -> dict[str, Any]:
    """`folder` holds config.json, one .onnx file per entry and weights.bin; returns what recipe.json says of them."""
    from stages.precision.recipe import WIDE, lower_entry, write_models

    shutil.copyfile(source / "config.json", folder / "config.json")
    config = HSTUConfig.from_pretrained(folder)
    models: dict[EntryName, Any] = {}
    entries: dict[str, Any] = {}
    for name in entry_names(config):
        models[name], entries[name] = lower_entry(
            source, name, config, recipe, calibration, emulated=not target.native_bf16
        )
    write_models(models, folder)
    return {"recipe": asdict(recipe), "wide": WIDE, "entries": entries}


def _compile(params: BuildEngineParams, folder: Path, target: Target) -> EngineSpec:
    """`folder` is an engine: engine.json names the file of every entry, compiled where the backend does that."""
    from serving.engine import EngineSpec
    from stages.tensorrt_builder import BuildSettings, build

    config = HSTUConfig.from_pretrained(folder)
    files: dict[str, str] = {}
    for name in entry_names(config):
        files[name] = f"{name}.onnx"
        if target.builder is not None:
            settings = BuildSettings(
                tf32=params.tf32, optimization_level=params.optimization_level, workspace_mib=params.workspace_mib
            )
            files[name] = f"{name}{target.builder.suffix}"
            warnings = build(target.builder, folder / f"{name}.onnx", folder / files[name], config, name, settings,
                             timing_cache=folder / "timing.cache" if target.executed else None)  # fmt: skip
            (folder / f"{name}.build.json").write_bytes(
                encode_json({"settings": asdict(settings), "warnings": warnings})
            )
            say(f"build-engine: {target.product} built {files[name]}")
    spec = EngineSpec(backend=target.backend, precision=params.precision, entries=files, executed=target.executed)
    (folder / "engine.json").write_bytes(encode_json(asdict(spec)))
    return spec


def _gate(params: BuildEngineParams, folder: Path, checkpoint: Artifact, evaluation: Histories) -> dict[str, Any]:
    from serving.engine import open_engine
    from serving.engines.torch import open_torch_engine
    from stages.quality import gate

    engine = open_engine(folder)
    reference = open_torch_engine(checkpoint.path)
    try:
        figures = gate(engine, reference, evaluation, params.limits)
    finally:
        engine.close()
    overlap, cosine = figures["top10_overlap"], figures["embedding_cosine"]["min"]
    quality = f", HR@10 {figures['hr_at_10']['engine']:.4f}" if "hr_at_10" in figures else ""
    say(f"build-engine: {params.precision} passes: lowest cosine {cosine:.6f}, top-10 overlap {overlap:.4f}{quality}")
    return figures


def _calibration_facts(checkpoint: Artifact, calibration: Histories) -> dict[str, Any]:
    """Which histories the scales come from; a foreign checkpoint without a log has drawn ones, and that is said."""
    details = json.loads(checkpoint.file("checkpoint.json").read_text())
    return {"calibration": {"histories": len(calibration), "source": details.get("histories", "unknown")}}


def _device(target: Target) -> str:
    if target.backend != "tensorrt":
        return "cpu" if target.executed else "none: built for every GPU the product supports"
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} sm_{major}{minor} CUDA {torch.version.cuda}"


STAGE = Stage(
    name="build-engine",
    summary="Lower the graphs to one precision, build an engine for one backend, keep it if it passes its gates.",
    params=BuildEngineParams,
    needs=("surgery", "checkpoint"),
    toolchain=("numpy", "onnx", "onnx-ir", "onnxruntime", "torch"),
    run=run,
    variant=variant,
)
