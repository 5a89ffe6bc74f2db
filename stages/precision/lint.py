"""What a lowered graph must hold to be legal for TensorRT: strong typing, and quantisation that its parser takes.

TensorRT rejects or silently mishandles: unsigned quantisation, zero points other than 0, quantised biases and
outputs, activations quantised per channel, scales that are not constants, operators that mix float types.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from hstu.errors import GateError
from stages.passes.lint import Finding
from stages.precision.regions import Body, infer_types

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
_CHANGES_TYPE = {"Cast", "CastLike", "QuantizeLinear", "DequantizeLinear"}
_RUNTIME_ONLY = {  # quantised operators that no TensorRT parser knows, and scales taken from the batch at hand
    "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv",
}  # fmt: skip
_LINEARS = {"MatMul", "Gemm"}


def lint_precision(model: onnx.ModelProto) -> list[Finding]:
    """Every fault of a lowered model; an empty list when there is none."""
    graph = ir.from_proto(model)
    try:
        infer_types(graph)
    except (onnx.shape_inference.InferenceError, GateError) as error:
        return [Finding(rule="types", where="model", message=str(error))]
    found = [*_runtime_only(graph), *_quantizers(graph), *_dequantizers(graph)]
    for where, body in (("graph", graph.graph), *((f"function {f.name}", f) for f in graph.functions.values())):
        found += _strong_types(where, body)
    return found


def _strong_types(where: str, body: Body) -> Iterator[Finding]:
    """All float operands of an operator are of one type, and none is float64."""
    for node in body:
        types = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype in _FLOATS}
        if ir.DataType.DOUBLE in types:
            yield _finding("float64", where, node, "TensorRT has no float64")
        if len(types) > 1 and node.op_type not in _CHANGES_TYPE:
            names = ", ".join(sorted(t.name.lower() for t in types if t is not None))
            yield _finding("mixed-types", where, node, f"{node.op_type} mixes {names}")


def _runtime_only(model: ir.Model) -> Iterator[Finding]:
    for where, body in (("graph", model.graph), *((f"function {f.name}", f) for f in model.functions.values())):
        for node in body:
            if node.op_type in _RUNTIME_ONLY:
                yield _finding("operator", where, node, f"{node.op_type} is not for TensorRT")


def _quantizers(model: ir.Model) -> Iterator[Finding]:
    """An activation is quantised with one constant scale, symmetrically to int8, and only to be dequantised again."""
    for node in model.graph:
        if node.op_type != "QuantizeLinear":
            continue
        yield from _scale_and_zero(node)
        scale = _constant(node, 1)
        if scale is not None and scale.size != 1:
            yield _finding("activation-scale", "graph", node, f"{scale.size} scales for one activation")
        readers = [use.node.op_type for use in node.outputs[0].uses()]
        if any(reader != "DequantizeLinear" for reader in readers):
            yield _finding("q-without-dq", "graph", node, f"read by {sorted(readers)}")


def _dequantizers(model: ir.Model) -> Iterator[Finding]:
    """A dequantised tensor is an operand of a linear; a stored one is an int8 weight with a scale per column."""
    for node in model.graph:
        if node.op_type != "DequantizeLinear":
            continue
        yield from _scale_and_zero(node)
        readers = [(use.node.op_type, use.idx) for use in node.outputs[0].uses()]
        stored = _constant(node, 0)
        if any(reader not in _LINEARS or index > 1 for reader, index in readers):
            yield _finding(
                "dq-reader", "graph", node, f"read by {sorted(readers)}, which is not an operand of a linear"
            )
        if stored is not None:
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            scale = _constant(node, 1)
            if stored.dtype != np.int8:
                yield _finding("weight-type", "graph", node, f"a stored tensor of {stored.dtype} (a quantised bias?)")
            elif scale is not None and scale.size != 1 and (axis != 1 or scale.shape != stored.shape[1:]):
                yield _finding("weight-scale", "graph", node, f"scales {scale.shape} on axis {axis} of {stored.shape}")
        else:
            source = node.inputs[0].producer() if node.inputs[0] is not None else None
            if source is None or source.op_type != "QuantizeLinear":
                yield _finding("dq-without-q", "graph", node, "neither a stored weight nor a quantised activation")


def _scale_and_zero(node: ir.Node) -> Iterator[Finding]:
    scale = _constant(node, 1)
    if scale is None:
        yield _finding("scale", "graph", node, "the scale is not a constant")
    elif not (np.isfinite(scale.astype(np.float32)).all() and (scale > 0).all()):
        yield _finding("scale", "graph", node, "a scale is not positive")
    zero = _constant(node, 2)
    if len(node.inputs) < 3 or zero is None or zero.dtype != np.int8:
        got = "uint8 (the default)" if zero is None else str(zero.dtype)
        yield _finding("unsigned", "graph", node, f"the zero point is {got}, and must be int8")
    elif zero.any():
        yield _finding("asymmetric", "graph", node, "the zero point is not 0")


def _constant(node: ir.Node, index: int) -> np.ndarray | None:  # type: ignore[type-arg]
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _finding(rule: str, where: str, node: ir.Node, message: str) -> Finding:
    return Finding(rule=rule, where=f"{where}, node {node.name!r}", message=message)
