"""A surgery pass of your own: constants of equal bytes are stored once.

usage: python examples/surgery_pass.py artifacts/surgery

To keep it, move `apply` and `REASON` into stages/passes/shared_constants.py and name that file in MODULES and PassName
of stages/surgery.py and in surgery.passes of params.yaml: the stage then lints, checks and compares it on every run.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import onnx_graphsurgeon as gs

from hstu.config import HSTUConfig
from hstu.signature import entry_names
from stages import entry_check, onnx_files

REASON = "one copy of each constant is fewer bytes to read"


def apply(graph: gs.Graph, _config: HSTUConfig) -> gs.Graph:
    """Every reader of a constant reads the first one of its type, shape and bytes."""
    first: dict[tuple[str, tuple[int, ...], bytes], gs.Constant] = {}
    for node in graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant):
                values = tensor.values
                node.inputs[index] = first.setdefault((str(values.dtype), values.shape, values.tobytes()), tensor)
    return graph.cleanup()


def main(folder: Path) -> None:
    """Rewrite the graphs of an artifact, elsewhere, and hold each against the one before in ONNX Runtime."""
    config = HSTUConfig.from_pretrained(folder)
    names = entry_names(config)
    before = onnx_files.read_models(folder, names)
    with tempfile.TemporaryDirectory() as place:
        after = {name: gs.export_onnx(apply(gs.import_onnx(model), config)) for name, model in before.items()}
        counts = {name: (len(before[name].graph.initializer), len(after[name].graph.initializer)) for name in names}
        onnx_files.write_models(after, Path(place))
        for name in names:
            expected = entry_check.onnxruntime_entry(folder / f"{name}.onnx")
            cases = entry_check.run_cases(config, name, expected, seed=0)
            error = entry_check.require_equal(
                name,
                cases,
                entry_check.onnxruntime_entry(Path(place) / f"{name}.onnx"),
                what="shared_constants",
                fix="correct the pass",
            )
            old, new = counts[name]
            sys.stdout.write(f"{name}: {old} constants → {new}, max abs error {error:.2g}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
