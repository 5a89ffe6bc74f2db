"""build-engine: the rewritten graphs at one precision, on one backend, kept only when they pass their gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hstu.artifact import Artifact, encode_json
from hstu.errors import ParameterError
from hstu.tolerances import TOLERANCES, Tolerance
from stages.contract import Outcome, Stage, say
from stages.parameters import require

if TYPE_CHECKING:
    from stages.engine_targets import Target
    from stages.tensorrt.builder import BuildSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildEngineParams:
    """See params.yaml for the meaning of each and its unit."""

    precision: Literal["fp32", "fp16", "bf16", "int8"]
    backend: Literal["auto", "onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"]
    rows: Literal["auto", "packed", "padded"]
    float_keep_wide: tuple[str, ...]
    int8_keep_wide: tuple[str, ...] | None
    int8_around: Literal["auto", "fp32", "fp16", "bf16"]
    int8_widen_at_most: int
    int8_force: bool
    calibration_histories: int
    calibration_method: Literal["max", "percentile", "mse"]
    calibration_percentile: float
    evaluation_histories: int
    max_abs_error: float | None
    min_cosine: float | None
    min_mean_cosine: float | None
    min_top10_overlap: float | None
    max_quality_loss: float | None
    tf32: bool
    optimization_level: int
    workspace_mib: int
    profiles: tuple[Literal["single", "batch", "long", "all"], ...]
    timing_caches: str | None = field(metadata={"path": True})
    refit: bool
    strip_plan: bool
    weight_streaming: bool
    version_compatible: bool
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"]
    tensorrt_attention: Literal["function", "plugin"]

    def __post_init__(self) -> None:
        require(self.int8_widen_at_most >= 0, "build-engine.int8_widen_at_most: negative",
                got=self.int8_widen_at_most, expected=">= 0")  # fmt: skip
        for name in ("calibration_histories", "evaluation_histories"):
            require(getattr(self, name) >= 2, f"build-engine.{name}: too few", got=getattr(self, name), expected=">= 2")
        require(50.0 <= self.calibration_percentile <= 100.0, "build-engine.calibration_percentile: out of range",
                got=self.calibration_percentile, expected="50..100")  # fmt: skip
        for name in ("max_abs_error", "min_cosine", "min_mean_cosine", "min_top10_overlap", "max_quality_loss"):
            value = getattr(self, name)
            require(value is None or 0.0 <= value <= 1.0, f"build-engine.{name}: out of range",
                    got=value, expected="0..1, or null for the precision's own")  # fmt: skip
        require(0 <= self.optimization_level <= 5, "build-engine.optimization_level: out of range",
                got=self.optimization_level, expected="0..5")  # fmt: skip
        require(len(set(self.profiles)) == len(self.profiles), "build-engine.profiles: one stands twice",
                got=list(self.profiles), expected="each once")  # fmt: skip
        require("all" in self.profiles or {"batch", "long"} <= set(self.profiles),
                "build-engine.profiles: some shapes are in none", got=list(self.profiles),
                expected="all, or both batch and long")  # fmt: skip
        require(self.workspace_mib >= 1, "build-engine.workspace_mib: must be positive",
                got=self.workspace_mib, expected=">= 1")  # fmt: skip

    @property
    def build_settings(self) -> BuildSettings:
        """What TensorRT's builder is told; the other backends have no use for it."""
        from stages.tensorrt.builder import BuildSettings

        return BuildSettings(**{item.name: getattr(self, item.name) for item in fields(BuildSettings)})

    @property
    def limits(self) -> Tolerance:
        """The gate: the precision's tolerances, with what these parameters change."""
        names = ("max_abs_error", "min_cosine", "min_mean_cosine", "min_top10_overlap", "max_quality_loss")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(TOLERANCES[self.precision], **changes)


def variant(params: BuildEngineParams) -> str:
    """The artifact's name: the precision, the backend when one was asked for, and that attention is a plugin."""
    backend = [] if params.backend == "auto" else [params.backend]
    return "-".join([params.precision, *backend, *(["plugin"] if params.tensorrt_attention == "plugin" else [])])


def run(params: BuildEngineParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Write an engine folder (`serving.engine`) with `recipe.json`: what computes in which type, and why.

    Raises MissingBackendError when the backend is not here, GateError with the figures when the engine is
    not good enough, ParameterError when `*_keep_wide` names no linear of the model.
    """
    from hstu.data.histories import Histories
    from stages.engine_build import EngineBuild
    from stages.engine_targets import choose
    from stages.precision.recipe import Recipe

    target, why = choose(params.backend, params.precision)
    version = target.require()
    if params.tensorrt_attention == "plugin" and target.backend != "tensorrt":
        raise ParameterError(
            "build-engine.tensorrt_attention: only TensorRT has the attention plugin",
            got=f"plugin, and an engine of {target.product} ({why})",
            expected="function",
            fix="build with --backend tensorrt, or set build-engine.tensorrt_attention: function",
        )
    say(f"build-engine: {params.precision} for {target.product} {version} ({why})")
    surgery, checkpoint = inputs["surgery"], inputs["checkpoint"]
    calibration = Histories.load(checkpoint.file("calibration.npz"))
    recipe = Recipe(
        precision=params.precision,
        around=target.around_int8 if params.int8_around == "auto" else params.int8_around,
        float_keep_wide=params.float_keep_wide,
        int8_keep_wide=target.int8_keep_wide if params.int8_keep_wide is None else params.int8_keep_wide,
        method=params.calibration_method,
        percentile=params.calibration_percentile,
        packed=_packed(params.rows, target, surgery),
    )
    calibration = calibration.select(range(min(params.calibration_histories, len(calibration))))
    evaluation = Histories.load(checkpoint.file("evaluation.npz"))
    evaluation = evaluation.select(range(min(params.evaluation_histories, len(evaluation))))
    build = EngineBuild(params, target, surgery, checkpoint, calibration, evaluation)
    spec, figures, facts = build.widening_until_good(recipe, folder)
    platform: dict[str, Any] = {
        "backend": target.backend,
        "product": target.product,
        "version": version,
        "device": _device(target),
        "executed": target.executed,
        "figures_from": target.product if target.executed else "the same ONNX on ONNX Runtime",
        "precision": params.precision,
        "rows": "packed" if recipe.packed else "padded",
        "chosen_because": why,
    }
    if target.backend == "tensorrt":
        platform["attention"] = params.tensorrt_attention  # the plugin's files and their SHA-256 are in build.json
    if params.precision == "int8":
        search = {"kept_wide": list(facts["recipe"]["int8_keep_wide"]), "sensitivity": facts.get("sensitivity", {})}
        platform["int8_search"] = search  # over the linears, by measured error, until the gate was passed
    (folder / "quality.json").write_bytes(encode_json(_quality(figures)))
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Outcome(metrics={**figures, "bytes": size, "entries": sorted(spec.entries)}, platform=platform)


def _packed(rows: str, target: Target, surgery: Artifact) -> bool:
    """Whether the engine is made of the graphs without padding; ParameterError when it should and there are none."""
    there = "retrieve.packed.onnx" in surgery.manifest["files"]
    if rows == "packed" and not there:
        raise ParameterError(
            "build-engine.rows: surgery has packed no graphs",
            got="packed",
            expected="padded, or auto",
            fix="put packing into surgery.passes and run surgery again",
        )
    return rows == "packed" or (rows == "auto" and there and target.packed)


def _quality(figures: Mapping[str, Any]) -> dict[str, float]:
    """What travels with the engine of its gate's figures, rounded so that the last bits of a sum change no artifact."""
    told = {"top10_overlap": figures["top10_overlap"], "min_embedding_cosine": figures["embedding_cosine"]["min"]}
    told |= {name: figures[name]["engine"] for name in ("hr_at_10", "ndcg_at_10") if name in figures}
    return {name: round(value, 5) for name, value in told.items()}


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
