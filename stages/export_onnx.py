"""Stage export-onnx: a checkpoint becomes one plain ONNX graph per entry, checked against eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hstu.artifact import Artifact, encode_json
from hstu.signature import entry_names
from stages.contract import Outcome, Stage, say
from stages.parameters import require

OPSETS = (20, 21)  # those that were parsed and built with TensorRT-RTX, and run on ONNX Runtime


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOnnxParams:
    """How the graphs are written; see params.yaml."""

    opset: int
    check_seed: int

    def __post_init__(self) -> None:
        require(self.opset in OPSETS, "export-onnx.opset: not supported", got=self.opset, expected=OPSETS)
        require(self.check_seed >= 0, "export-onnx.check_seed: negative", got=self.check_seed, expected=">= 0")


def run(params: ExportOnnxParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Write `<entry>.onnx`, `weights.bin` and `config.json`; GateError when an entry differs from eager PyTorch."""
    from hstu.checkpoints.huggingface import load_pretrained
    from serving.engines.torch import TorchEngine
    from stages import entry_check, onnx_files
    from stages.exporter import export_entry

    model = load_pretrained(inputs["checkpoint"].path)
    config = model.config
    (folder / "config.json").write_bytes(encode_json(config.to_pretrained()))
    num_nodes: dict[str, int] = {}
    with onnx_files.open_weights(folder) as writer:
        for name in entry_names(config):
            say(f"export-onnx: tracing {name}")
            graph = export_entry(model, name, opset=params.opset, writer=writer)
            num_nodes[name] = len(graph.graph.node)
            onnx_files.write_model(graph, folder, name, writer)
    eager = TorchEngine(model)
    errors: dict[str, float] = {}
    for name in entry_names(config):
        path = folder / f"{name}.onnx"
        onnx_files.check_file(path)
        cases = entry_check.run_cases(config, name, partial(eager.run, name), seed=params.check_seed)
        errors[name] = entry_check.require_equal(
            name,
            cases,
            entry_check.onnxruntime_entry(path),
            what="export-onnx: ONNX Runtime against eager PyTorch",
            fix="look for weights of extreme size in the checkpoint; a healthy model stays far below this",
        )
        say(f"export-onnx: {name} has {num_nodes[name]} nodes, max abs error to eager {errors[name]:.2g}")
    metrics: dict[str, Any] = {
        "num_nodes": num_nodes,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "max_abs_error": errors,
    }
    return Outcome(metrics=metrics)


STAGE = Stage(
    name="export-onnx",
    summary="Export a checkpoint to plain ONNX graphs, one per entry, and check them against eager PyTorch.",
    params=ExportOnnxParams,
    needs=("checkpoint",),
    toolchain=("torch", "onnx", "onnxscript", "onnx-ir"),
    run=run,
)
