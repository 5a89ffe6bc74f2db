"""A precision as a whole: which part of the model computes in which type, and how that was decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.errors import GateError, ParameterError
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
    """What a user chooses; `*_keep_wide` names roles (output) or modules (layers.3.output).

    `around` is the type of what int8 leaves: fp32, fp16 or bf16. The other precisions do not look at it.
    """

    precision: str
    around: str
    float_keep_wide: tuple[str, ...]
    int8_keep_wide: tuple[str, ...]
    method: calibration.Method
    percentile: float
    packed: bool = False  # the graphs that surgery's pass `packing` wrote

    @property
    def floats(self) -> str:
        """The type of what is not int8: fp32, fp16 or bf16."""
        return self.around if self.precision == "int8" else self.precision

    def source(self, folder: Path, name: str) -> Path:
        """The file of an entry in the surgery artifact that is lowered."""
        return folder / (f"{name}.packed.onnx" if self.packed else f"{name}.onnx")


def lower_entry(
    folder: Path, name: EntryName, config: HSTUConfig, recipe: Recipe, histories: Histories, *, emulated: bool
) -> tuple[ir.Model, dict[str, Any]]:
    """The model of an entry of the surgery artifact at the recipe's precision, and what was done to it.

    With `emulated` what is bf16 computes in float32 and rounds where bf16 would. Raises ParameterError when
    `keep_wide` names what the model does not have, GateError when the result breaks a rule of TensorRT's.
    """
    model = ir.load(recipe.source(folder, name))
    linears = find_linears(model)
    types = {linear.name: "float32" for linear in linears}
    facts: dict[str, Any] = {"linears": types, "attention": "float32", "tables": "float32"}
    narrow: list[Linear] = []
    if recipe.precision == "int8":
        require_known(recipe.int8_keep_wide, linears, parameter="build-engine.int8_keep_wide")
        narrow = narrow_linears(model, recipe)
        if not narrow:
            raise ParameterError(
                "build-engine.int8_keep_wide: nothing is left for int8",
                got=list(recipe.int8_keep_wide),
                expected="fewer names",
                fix="build --precision fp32 instead",
            )
        scales = activation_scales(folder, name, config, recipe, histories, narrow)
        int8.quantize(model, narrow, scales)
        facts["scales"] = {linear: asdict(scale) for linear, scale in scales.items()}
    if recipe.floats != "fp32":
        require_known(recipe.float_keep_wide, linears, parameter="build-engine.float_keep_wide")
        dtype = floats.DTYPES[recipe.floats]
        types |= floats.lower_floats(model, dtype, linears, keep_wide=recipe.float_keep_wide)
        facts["attention"] = facts["tables"] = dtype.name.lower()
    types |= {linear.name: "int8" for linear in narrow}
    _require_legal(name, recipe.precision, model)
    if emulated and recipe.floats == "bf16":
        emulate(model, ir.DataType.BFLOAT16)
        facts["emulated"] = "weights are stored in bfloat16, results rounded to it, sums and products are float32"
    return model, facts


def write_models(models: dict[EntryName, ir.Model], folder: Path) -> None:
    """One .onnx file per entry and their shared weights file."""
    with open_weights(folder) as writer:
        for name, model in models.items():
            move_weights(model, writer)
            write_model(ir.to_proto(model), folder, name, writer)


def narrow_linears(model: ir.Model, recipe: Recipe) -> list[Linear]:
    """The linears that the recipe makes int8; the item head, which decides ranks, never is."""
    return [x for x in find_linears(model) if x.role != "item_head" and not matches(x, recipe.int8_keep_wide)]


def activation_scales(
    folder: Path, name: EntryName, config: HSTUConfig, recipe: Recipe, histories: Histories, narrow: Sequence[Linear]
) -> dict[str, calibration.Scale]:
    """The scale of every narrow linear's input, by linear name, from the fp32 graph of the surgery artifact.

    `extend` takes those that the same weights have in `retrieve`: a returning user gets that entry's answers.
    """
    if name == "extend":
        all_of_retrieve = {x.weight.name: x for x in find_linears(ir.load(recipe.source(folder, "retrieve")))}
        same = {linear.name: all_of_retrieve[linear.weight.name] for linear in narrow}
        found = activation_scales(folder, "retrieve", config, recipe, histories, list(same.values()))
        return {linear: found[other.name] for linear, other in same.items()}
    tensors = {linear.name: linear.input.name or "" for linear in narrow}

    def batches() -> Sequence[dict[str, Array]]:
        rows = [histories.select([row]).newest(config.max_history) for row in range(len(histories))]
        feeds: list[dict[str, Array]] = [dict(row.feeds(config)) for row in rows]
        if name == "rank":
            feeds = [{**f, "candidate_ids": spread_candidates(config, row)} for f, row in zip(feeds, rows, strict=True)]
        return feeds

    observed = list(dict.fromkeys(tensors.values()))
    fitted, held_out = calibration.observe(recipe.source(folder, name), observed, batches())
    scales = {
        tensor: calibration.fit(fitted[tensor], held_out[tensor], recipe.method, percentile=recipe.percentile)
        for tensor in observed
    }
    return {linear: scales[tensor] for linear, tensor in tensors.items()}


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
