"""The item table is stored once: scores are products with the table itself, times the reciprocals of its norms."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from hstu.config import L2_EPS, HSTUConfig
from stages.passes import selection

REASON = "a second, normalised copy of the item table is neither stored nor made by every runtime that loads the model"


def apply(graph: gs.Graph, config: HSTUConfig) -> gs.Graph:
    """In `retrieve` and `extend`, user · normalised tableᵀ becomes (user · tableᵀ without column 0) / folded norms."""
    if graph.name not in ("retrieve", "extend"):
        return graph
    top_k = selection.only((node for node in graph.nodes if node.op == "TopK"), "one TopK")
    scores = selection.producer(top_k.inputs[0], "MatMul")
    table = selection.constant(graph, "item_embedding.weight")
    norms = np.sqrt(np.square(table.values[1:].astype(np.float64)).sum(axis=1))
    reciprocals = (1.0 / np.maximum(norms, L2_EPS)).astype(np.float32)
    products = selection.add(
        graph, "Gemm", "item_head.products", [scores.inputs[0], table], attrs={"transB": 1}
    )  # [B, num_items + 1]; row 0 of the table is padding
    start, stop, axis = (np.array([value], dtype=np.int64) for value in (1, config.num_items + 1, 1))
    of_items = selection.add(graph, "Slice", "item_head.of_items", [products, start, stop, axis])
    top_k.inputs[0] = selection.add(
        graph, "Mul", "item_head.scores", [of_items, gs.Constant("item_head.reciprocal_norms", reciprocals)]
    )
    return graph
