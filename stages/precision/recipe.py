"""A precision as a whole: which part of the model computes in which type, and how that was decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.errors import GateError
from hstu.signature import EntryName
from serving.engine import Array
from stages.golden import spread_candidates
from stages.onnx_files import move_weights, open_weights, write_model
from stages.passes.lint import lint
from stages.precision import calibration, floats, int8
from stages.precision.emulation import emulate
from stages.precision.linears import Linear, find_linears, matches, require_known
from stages.precision.lint import lint_precision

WIDE = {  # what no precision lowers
    "layer_norm": "float32",
    "residual_stream": "float32",
    "item_scores": "float32",
    "top_k": "float32",
    "time_buckets": "int64, guessed by a float32 logarithm",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a user chooses; `*_keep_wide` names roles (output) or modules (layers.3.output)."""

    precision: str
    float_keep_wide: tuple[str, ...]
    int8_keep_wide: tuple[str, ...]
    method: calibration.Method
    percentile: float


def lower_entry(
    folder: Path, name: EntryName, config: HSTUConfig, recipe: Recipe, histories: Histories, *, emulated: bool
) -> tuple[ir.Model, dict[str, Any]]:
    """The model of an entry of the surgery artifact at the recipe's precision, and what was done to it.

    With `emulated` a bf16 model computes in float32 and rounds where bf16 would. Raises ParameterError when
    `keep_wide` names what the model does not have, GateError when the result breaks a rule of TensorRT's.
    """
    model = ir.load(folder / f"{name}.onnx")
    if recipe.precision == "fp32":
        return model, {"linears": {linear.name: "float32" for linear in find_linears(model)}, "attention": "float32"}
    linears = find_linears(model)
    if recipe.precision == "int8":
        require_known(recipe.int8_keep_wide, linears, parameter="build-engine.int8_keep_wide")
        narrow = [x for x in linears if x.role != "item_head" and not matches(x, recipe.int8_keep_wide)]
        if name == "extend":
            scales = _scales_of_retrieve(folder, config, recipe, histories, narrow)
        else:
            scales = _scales(folder, name, config, recipe, histories, {x.name: x.input.name or "" for x in narrow})
        int8.quantize(model, narrow, scales)
        types = {x.name: "int8" if x in narrow else "float32" for x in linears}
        facts: dict[str, Any] = {
            "linears": types,
            "attention": "float32",
            "scales": {linear: asdict(scale) for linear, scale in scales.items()},
        }
    else:
        require_known(recipe.float_keep_wide, linears, parameter="build-engine.float_keep_wide")
        dtype = floats.DTYPES[recipe.precision]
        types = floats.lower_floats(model, dtype, keep_wide=recipe.float_keep_wide)
        facts = {"linears": types, "attention": dtype.name.lower(), "tables": dtype.name.lower()}
    _require_legal(name, recipe.precision, model)
    if emulated and recipe.precision == "bf16":
        emulate(model, ir.DataType.BFLOAT16)
        facts["emulated"] = "weights are stored in bfloat16, results rounded to it, sums and products are float32"
    return model, facts


def write_models(models: dict[EntryName, ir.Model], folder: Path) -> None:
    """One .onnx file per entry and their shared weights file."""
    with open_weights(folder) as writer:
        for name, model in models.items():
            move_weights(model, writer)
            write_model(ir.to_proto(model), folder, name, writer)


def _scales(
    folder: Path, name: EntryName, config: HSTUConfig, recipe: Recipe, histories: Histories, tensors: dict[str, str]
) -> dict[str, calibration.Scale]:
    """The scale of every narrow linear's input, by linear name."""

    def batches() -> Sequence[dict[str, Array]]:
        rows = [histories.select([row]).newest(config.max_history) for row in range(len(histories))]
        feeds: list[dict[str, Array]] = [dict(row.feeds(config)) for row in rows]
        if name == "rank":
            feeds = [{**f, "candidate_ids": spread_candidates(config, row)} for f, row in zip(feeds, rows, strict=True)]
        return feeds

    observed = list(dict.fromkeys(tensors.values()))
    fitted, held_out = calibration.observe(folder / f"{name}.onnx", observed, batches())
    scales = {
        tensor: calibration.fit(fitted[tensor], held_out[tensor], recipe.method, percentile=recipe.percentile)
        for tensor in observed
    }
    return {linear: scales[tensor] for linear, tensor in tensors.items()}


def _scales_of_retrieve(
    folder: Path, config: HSTUConfig, recipe: Recipe, histories: Histories, narrow: Sequence[Linear]
) -> dict[str, calibration.Scale]:
    """The scales that the same linears have in `retrieve`, by name: a returning user gets that entry's answers."""
    linears = {linear.weight.name: linear for linear in find_linears(ir.load(folder / "retrieve.onnx"))}
    same = {linear.name: linears[linear.weight.name] for linear in narrow}
    found = _scales(folder, "retrieve", config, recipe, histories, {x.name: x.input.name or "" for x in same.values()})
    return {name: found[linear.name] for name, linear in same.items()}


def _require_legal(name: EntryName, precision: str, model: ir.Model) -> None:
    proto = ir.to_proto(model)
    found = [*lint(proto), *lint_precision(proto)]
    if found:
        raise GateError(
            f"the {precision} graph of {name!r} breaks rules that TensorRT has",
            got="; ".join(map(str, found)),
            expected="no finding",
            fix="report this as a bug, with the parameters of surgery and build-engine",
        )
