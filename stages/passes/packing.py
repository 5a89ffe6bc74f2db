"""Padding taken out: what is computed at every event is computed at the events of all users, one after the other.

A padded [B, L, ·] becomes packed rows [1, T, ·], user b's before user b+1's. T counts the events; a user without any
has one row all the same, so that no tensor is empty and every user has a last row. Padded again are only the rows
that attention reads and what leaves the graph; a runtime whose attention takes packed rows skips both
(`serving.engines.openvino_packing`), by the names of the three tensors that tell where rows stand:

    packing.rows [T]        where each packed row stands in the padded rows, [B·L]
    packing.places [B, L]   the packed row at each padded place; after the end of a history its last row
    packing.last [B]        the packed row of each user's last event
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from hstu.config import HSTUConfig
from stages.passes import function_bodies, functions, selection

REASON = "a batch of histories of mixed length costs what its events cost, not what its padding would"

# Which input of an attention function holds rows of the history.
_HISTORY_INPUT = {
    function_bodies.HISTORY: 0,
    function_bodies.QUERIES: 1,
    function_bodies.CANDIDATES: 0,
    function_bodies.EXTEND: 0,
    function_bodies.EXTEND_QUERIES: 1,
}
_GIVES_HISTORY = (function_bodies.HISTORY, function_bodies.EXTEND)
_ANY_ROWS = {"Add", "Mul", "Sigmoid", "Cast", "Identity"}  # of the same rows, or of rows and constants
_LAST_AXIS = {"LayerNormalization": -1, "Split": 0, "Concat": None}  # by their default axis


def apply(graph: gs.Graph, config: HSTUConfig) -> gs.Graph:
    """From the first layer's input on rows are packed, as far as each row is computed by itself."""
    first = selection.only(
        (node for node in graph.nodes if node.domain == functions.DOMAIN and _layer(node) == 0
         and (node.op in _GIVES_HISTORY or config.num_layers == 1)),
        "one attention of the history in the first layer",
    )  # fmt: skip
    projection = selection.producer(first.inputs[_HISTORY_INPUT[first.op]], "MatMul")
    rows = selection.producer(projection.inputs[0], "LayerNormalization").inputs[0]
    _Packing(graph, config).apply(rows)
    graph.cleanup()
    return graph


class _Packing:
    """One graph while its rows are packed."""

    def __init__(self, graph: gs.Graph, config: HSTUConfig) -> None:
        self._graph, self._index = graph, f"layers.{config.num_layers - 1}.index"
        inputs = {value.name: value for value in graph.inputs}
        lengths, item_ids = inputs["lengths"], inputs["item_ids"]
        one = np.array([1], dtype=np.int64)
        width = selection.add(graph, "Shape", "packing.width", [item_ids], attrs={"start": 1})
        scalar = selection.add(graph, "Squeeze", "packing.end", [width, np.array([0], dtype=np.int64)])
        zero, step = np.array(0, dtype=np.int64), np.array(1, dtype=np.int64)
        at = selection.add(graph, "Range", "packing.at", [zero, scalar, step])  # [L]
        counts = selection.add(graph, "Max", "packing.counts", [lengths, one])  # [B]
        ends = selection.add(graph, "Unsqueeze", "packing.ends", [counts, one])  # [B, 1]
        inside = selection.add(graph, "Less", "packing.inside", [at, ends])  # [B, L]
        flat = selection.add(graph, "Reshape", "packing.flat", [inside, np.array([-1], dtype=np.int64)])
        found = selection.add(graph, "NonZero", "packing.found", [flat])  # [1, T]
        self._rows = selection.add(graph, "Squeeze", "packing.rows", [found, np.array([0], dtype=np.int64)])
        total = selection.add(graph, "CumSum", "packing.total", [counts, np.array(0, dtype=np.int64)])
        self._last = selection.add(graph, "Sub", "packing.last", [total, one])
        last = selection.add(graph, "Unsqueeze", "packing.last_column", [self._last, one])
        back = selection.add(
            graph, "Sub", "packing.back", [ends, selection.add(graph, "Add", "packing.next", [at, one])]
        )
        kept = selection.add(
            graph, "Max", "packing.kept", [back, np.array([0], dtype=np.int64)]
        )  # rows before the last
        self._places = selection.add(graph, "Sub", "packing.places", [last, kept])
        self._packed: dict[int, gs.Tensor] = {}  # id of every tensor that is packed
        self._padded: dict[int, gs.Variable] = {}  # by the id of a packed one

    def apply(self, rows: gs.Tensor) -> None:
        """What is computed of `rows` [B, L, D] is packed, or reads them padded again."""
        readers = list(rows.outputs)
        start = self._pack(rows, int(rows.shape[-1]))
        for node in readers:
            node.inputs = [start if tensor is rows else tensor for tensor in node.inputs]
        for node in list(self._graph.toposort().nodes):
            if any(id(tensor) in self._packed for tensor in node.inputs):
                self._visit(node)

    def _visit(self, node: gs.Node) -> None:
        if _row_by_row(node) and all(id(t) in self._packed or isinstance(t, gs.Constant) for t in node.inputs):
            for tensor in node.outputs:
                self._remember(tensor)
        elif node.op == "GatherND" and node.inputs[1].name == self._index:
            self._read_last(node)
        else:
            for index, tensor in enumerate(node.inputs):
                if id(tensor) in self._packed:
                    self._pad(node, index)
            if node.domain == functions.DOMAIN and node.op in _GIVES_HISTORY:
                self._pack_output(node)

    def _remember(self, tensor: gs.Tensor) -> None:
        self._packed[id(tensor)] = tensor

    def _pack(self, rows: gs.Tensor, columns: int) -> gs.Variable:
        """Packed rows [1, T, columns] of padded ones."""
        shape = np.array([1, -1, columns], dtype=np.int64)
        flat = selection.add(self._graph, "Reshape", f"packing.{rows.name}.flat", [rows, shape])
        packed = selection.add(
            self._graph, "Gather", f"packing.{rows.name}.packed", [flat, self._rows], attrs={"axis": 1}
        )
        self._remember(packed)
        return packed

    def _pack_output(self, node: gs.Node) -> None:
        """What a function gives is packed for those that read it."""
        output = node.outputs[0]
        padded = gs.Variable(f"packing.{output.name}.padded")
        node.outputs[0] = padded
        columns = int(node.attrs["num_heads"]) * int(node.attrs["v_dim"])
        selection.replace_uses(output, self._pack(padded, columns))

    def _pad(self, node: gs.Node, index: int) -> None:
        """The node reads the padded form of a packed input."""
        packed = node.inputs[index]
        if id(packed) not in self._padded:
            name = f"packing.{packed.name}.padded"
            gathered = selection.add(
                self._graph, "Gather", f"{name}_batch", [packed, self._places], attrs={"axis": 1}
            )  # [1, B, L, ·]
            self._padded[id(packed)] = selection.add(
                self._graph, "Squeeze", name, [gathered, np.array([0], dtype=np.int64)]
            )
        node.inputs[index] = self._padded[id(packed)]

    def _read_last(self, node: gs.Node) -> None:
        """The rows of the last events [B, 1, ·] are read where they stand among the packed ones."""
        output = node.outputs[0]
        chosen = selection.add(
            self._graph, "Gather", f"packing.{output.name}.chosen", [node.inputs[0], self._last], attrs={"axis": 1}
        )  # [1, B, ·]
        node.op, node.name = "Transpose", f"{node.name}:packed"
        node.inputs, node.attrs = [chosen], {"perm": [1, 0, 2]}


def _layer(node: gs.Node) -> int:
    """The number in a name such as "layers.3.attention/HSTUAttention"."""
    return int(node.name.split(".")[1])


def _row_by_row(node: gs.Node) -> bool:
    """Whether the node computes each row of its first input by itself, given that its others are rows or constants."""
    if node.op == "MatMul":
        return isinstance(node.inputs[1], gs.Constant) and len(node.inputs[1].shape) == 2
    if node.op in _LAST_AXIS:
        return node.attrs.get("axis", _LAST_AXIS[node.op]) in (-1, 2)
    return node.op in _ANY_ROWS and all(_at_most_a_row(t) for t in node.inputs if isinstance(t, gs.Constant))


def _at_most_a_row(constant: gs.Constant) -> bool:
    """Whether a constant is the same for all rows."""
    return all(size == 1 for size in constant.shape[:-1])
