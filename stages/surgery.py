"""Stage surgery: the exported graphs rewritten by an ordered list of passes, each checked after it ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hstu.artifact import Artifact, encode_json
from hstu.config import HSTUConfig
from hstu.errors import GateError
from hstu.signature import EntryName, entry, entry_names
from stages.contract import Outcome, Stage, say
from stages.parameters import require

if TYPE_CHECKING:
    import onnx

PassName = Literal[
    "item_head", "fold_constants", "attention_function", "plain_gather", "last_position", "causal_tiles", "packing"
]
MODULES: Mapping[str, str] = {  # the order in which passes may run
    "item_head": "stages.passes.item_head",
    "fold_constants": "stages.passes.fold_constants",
    "attention_function": "stages.passes.attention_function",
    "plain_gather": "stages.passes.plain_gather",
    "last_position": "stages.passes.last_position",
    "causal_tiles": "stages.passes.causal_tiles",
    "packing": "stages.passes.packing",
}
NEEDS: Mapping[str, tuple[str, ...]] = {
    "last_position": ("fold_constants", "attention_function"),
    "causal_tiles": ("attention_function",),
    "packing": ("fold_constants", "attention_function"),
}
PACKED = "packed"  # what packing makes stands beside the padded graph: which one is faster depends on the runtime


@dataclass(frozen=True, kw_only=True, slots=True)
class SurgeryParams:
    """Which passes run; see params.yaml."""

    passes: tuple[PassName, ...]
    check_seed: int

    def __post_init__(self) -> None:
        ordered = tuple(name for name in MODULES if name in self.passes)
        require(self.passes == ordered, "surgery.passes: order or repetition", got=self.passes, expected=list(MODULES))
        for name in self.passes:
            missing = [need for need in NEEDS.get(name, ()) if need not in self.passes]
            require(not missing, f"surgery.passes: {name} needs another pass", got=self.passes, expected=missing)
        require(self.check_seed >= 0, "surgery.check_seed: negative", got=self.check_seed, expected=">= 0")


def run(params: SurgeryParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Write the rewritten `<entry>.onnx`, `weights.bin`, `config.json` and `passes.json`.

    The pass `packing` leaves these as they are and writes `<entry>.packed.onnx` beside them, with the same weights.
    After every pass each entry is linted, checked and held against the exported graph on ONNX Runtime;
    GateError names the pass that broke something, with the figures.
    """
    from stages import entry_check, onnx_files

    source = inputs["export-onnx"]
    config = HSTUConfig.from_pretrained(source.path)
    names = entry_names(config)
    cases = {
        name: entry_check.run_cases(
            config, name, entry_check.onnxruntime_entry(source.file(f"{name}.onnx")), seed=params.check_seed
        )
        for name in names
    }
    onnx_files.write_models(onnx_files.read_models(source.path, names), folder)
    metrics: dict[str, Any] = {}
    for pass_name in params.passes:
        written = _rewrite(pass_name, names, folder, config)
        metrics[pass_name] = {}
        for name, (model, path) in written.items():
            _check(pass_name, name, model, path, config)
            error = entry_check.require_equal(
                name,
                cases[name],
                entry_check.onnxruntime_entry(path),
                what=f"surgery: pass {pass_name}",
                fix=f"leave {pass_name} out of surgery.passes",
            )
            metrics[pass_name][name] = {"num_nodes": len(model.graph.node), "max_abs_error": error}
            say(f"surgery: {pass_name}: {name} has {len(model.graph.node)} nodes, max abs error {error:.2g}")
    reasons = [{"name": name, "reason": import_module(MODULES[name]).REASON} for name in params.passes]
    (folder / "config.json").write_bytes(encode_json(config.to_pretrained()))
    (folder / "passes.json").write_bytes(encode_json({"passes": reasons}))
    metrics["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    return Outcome(metrics=metrics)


def _rewrite(
    pass_name: str, names: tuple[EntryName, ...], folder: Path, config: HSTUConfig
) -> dict[EntryName, tuple[onnx.ModelProto, Path]]:
    """Every entry's model after one pass, and the file it now stands in."""
    from stages import onnx_files

    written = {}
    if pass_name == "packing":
        for name in names:
            model = apply_pass(pass_name, onnx_files.read_graph(folder, name), config)
            onnx_files.write_graph(model, folder, f"{name}.{PACKED}")
            written[name] = model, folder / f"{name}.{PACKED}.onnx"
        return written
    models = onnx_files.read_models(folder, names)
    rewritten: dict[str, onnx.ModelProto] = {name: apply_pass(pass_name, models.pop(name), config) for name in names}
    onnx_files.write_models(rewritten, folder)
    return {name: (rewritten[name], folder / f"{name}.onnx") for name in names}


def apply_pass(pass_name: str, model: onnx.ModelProto, config: HSTUConfig) -> onnx.ModelProto:
    """The model after one pass, sorted, without what nothing reads, with shapes inferred anew."""
    import onnx
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.logger import G_LOGGER

    G_LOGGER.severity = G_LOGGER.ERROR
    graph = import_module(MODULES[pass_name]).apply(gs.import_onnx(model), config)
    rewritten = gs.export_onnx(graph.cleanup(remove_unused_graph_inputs=False).toposort())
    del rewritten.graph.value_info[:]
    rewritten.ClearField("producer_name")
    rewritten.ClearField("producer_version")
    return onnx.shape_inference.infer_shapes(rewritten, check_type=True, strict_mode=True, data_prop=True)


def _check(pass_name: str, name: EntryName, model: onnx.ModelProto, path: Path, config: HSTUConfig) -> None:
    """Lint, interface and ONNX's own checker find no fault; GateError names the pass and every finding."""
    from stages import onnx_files
    from stages.passes.lint import lint

    findings = lint(model)
    if findings:
        raise GateError(
            f"surgery: pass {pass_name}: the linter finds faults in {name!r}",
            got="; ".join(map(str, findings)),
            expected="none",
            fix=f"leave {pass_name} out of surgery.passes",
        )
    onnx_files.check_interface(model, entry(config, name))
    onnx_files.check_file(path)


STAGE = Stage(
    name="surgery",
    summary="Rewrite the exported graphs: attention as a function, the last layer for one position, constants folded.",
    params=SurgeryParams,
    needs=("export-onnx",),
    toolchain=("onnx", "onnx-graphsurgeon", "onnxruntime"),
    run=run,
)
