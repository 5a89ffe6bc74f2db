"""What depends on weights alone is computed once: transposed weight matrices above all."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from hstu.config import HSTUConfig

REASON = "a weight is transposed once here instead of by every runtime that loads the model"


def apply(graph: gs.Graph, _config: HSTUConfig) -> gs.Graph:
    """Every node that reads constants alone is a constant; a transposed weight is called `<weight>.transposed`."""
    for node in graph.nodes:
        if node.op == "Transpose" and isinstance(node.inputs[0], gs.Constant):
            node.outputs[0].name = f"{node.inputs[0].name}.transposed"
    # No folding of shapes: all that remain are dynamic, and its rewriting of casts is not wanted near the buckets.
    return graph.fold_constants(fold_shapes=False, error_ok=False)
