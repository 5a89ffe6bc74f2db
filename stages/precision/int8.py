"""Linears in int8, by explicit symmetric quantise/dequantise pairs that TensorRT and ONNX Runtime both fuse.

    y = DQ(Q(x; s_x)) · DQ(W_int8; s_w)      Q(x) = clamp(round(x / s_x), -128, 127), zero point 0

s_x: one static scale per tensor, so no answer depends on who shares the batch; s_w: one per output
column, float32 [N]. Weights are stored as int8 [K, N]. Nothing is quantised at an output, no bias is, and
attention's own products stay float. What TensorRT demands of such a graph is in `stages.precision.lint`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from stages.precision.calibration import LEVELS, Scale, storable
from stages.precision.linears import Linear
from stages.precision.regions import drop_unused


def quantize(model: ir.Model, linears: Sequence[Linear], scales: Mapping[str, Scale]) -> None:
    """The given linears multiply int8 by int8; `scales` are those of their inputs, by linear name."""
    weights: dict[ir.Value, ir.Value] = {}
    inputs: dict[tuple[ir.Value, float], ir.Value] = {}
    for linear in linears:
        node, weight = linear.node, linear.weight
        if weight not in weights:
            weights[weight] = _quantized_weight(model.graph, node, weight)
        node.replace_input_with(1, weights[weight])
        x, scale = node.inputs[0], scales[linear.name].scale
        assert x is not None
        if (x, scale) not in inputs:
            inputs[x, scale] = _quantized_input(model.graph, node, x, scale)
        node.replace_input_with(0, inputs[x, scale])
    drop_unused(model.graph)


def quantize_columns(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """int8 [K, N] and scales float32 [N]: the largest magnitude of each column becomes 126 or 127."""
    scale = storable(np.abs(weight).max(axis=0).astype(np.float32) / LEVELS)
    scale[scale == 0.0] = 1.0
    return np.clip(np.rint(weight / scale), -LEVELS, LEVELS).astype(np.int8), scale


def _quantized_weight(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> ir.Value:
    assert weight.const_value is not None
    values, scale = quantize_columns(weight.const_value.numpy())
    constants = [
        _initializer(graph, f"{weight.name}_int8", values),
        _initializer(graph, f"{weight.name}_scale", scale),
        _initializer(graph, f"{weight.name}_zero", np.zeros(scale.shape, dtype=np.int8)),
    ]
    return _insert(graph, node, "DequantizeLinear", constants, f"{weight.name}_dequantized", axis=1)


def _quantized_input(graph: ir.Graph, node: ir.Node, x: ir.Value, scale: float) -> ir.Value:
    constants = [
        _initializer(graph, f"{x.name}_scale", np.array(scale, dtype=np.float32)),
        _initializer(graph, f"{x.name}_zero", np.array(0, dtype=np.int8)),
    ]
    quantized = _insert(graph, node, "QuantizeLinear", [x, *constants], f"{x.name}_int8")
    return _insert(graph, node, "DequantizeLinear", [quantized, *constants], f"{x.name}_dequantized")


def _initializer(graph: ir.Graph, name: str, values: npt.NDArray[np.generic]) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _insert(
    graph: ir.Graph, before: ir.Node, op_type: str, inputs: list[ir.Value], name: str, axis: int | None = None
) -> ir.Value:
    attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
    node = ir.Node("", op_type, inputs, attributes, name=name, num_outputs=1)
    node.outputs[0].name = name
    node.outputs[0].dtype = ir.DataType.INT8 if op_type == "QuantizeLinear" else ir.DataType.FLOAT
    graph.insert_before(before, node)
    return node.outputs[0]
