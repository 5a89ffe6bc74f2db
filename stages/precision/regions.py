"""Chosen nodes of a graph compute in a narrower float type; casts stand exactly at the borders.

The result is strongly typed: no operator mixes float types, so TensorRT takes it as it is, and the type
every tensor has is written in the graph and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from hstu.errors import GateError

# Operators that move values and never change them: they take the type of what they move.
MOVES = frozenset(
    {"Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split", "Squeeze",
     "Transpose", "Unsqueeze"}
)  # fmt: skip
Choice = Callable[[ir.Node], bool]
Body = ir.Graph | ir.Function


def lower(model: ir.Model, dtype: ir.DataType, *, chosen: Choice, stored: Choice) -> None:
    """Every chosen node of the main graph computes in `dtype`, and so does what only moves the results.

    Nodes that are `stored` compute in float32 by a weight (their second input) that is stored in `dtype`.
    The function that a chosen node calls is left as it is: its body must take the type of its inputs
    (`stages.passes.lint` sees to that). Weights of lowered nodes are stored in `dtype`. Inputs and outputs
    of the model keep their types.
    """
    infer_types(model)
    _Region(model.graph, dtype).lower(chosen, stored)
    drop_unused(model.graph)
    infer_types(model)


def drop_unused(graph: ir.Graph) -> None:
    """Initializers and constants that nothing reads are gone."""
    for node in reversed(list(graph)):
        if all(not v.uses() and not v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def convert(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """The tensor's values rounded to `dtype` (to nearest even); GateError when one does not fit."""
    with np.errstate(over="ignore"):  # found out below, by name
        values = tensor.numpy().astype(dtype.numpy())
    if not np.isfinite(values.astype(np.float32)).all():
        raise GateError(f"weight {name!r} does not fit {dtype.name}", fix="use bf16 or fp32 for this checkpoint")
    return ir.Tensor(values, dtype=dtype, name=name)


class _Region:
    """The chosen nodes of a graph, which meet the others only across casts."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph, self._dtype = graph, dtype
        self._suffix = f"_{dtype.name.lower()}"
        self._low: dict[ir.Value, ir.Value] = {}  # a float32 value → the same in the narrower type
        self._born_low: set[ir.Value] = set()  # float32 values that are casts of what a lowered node gave

    def lower(self, chosen: Choice, stored: Choice) -> None:
        """Rewrite the graph."""
        for node in list(self._graph):
            if chosen(node) or self._moves_low(node):
                self._lower_node(node)
            elif stored(node):
                weight = node.inputs[1]
                assert weight is not None
                wide = self._cast(self._low_version(weight), ir.DataType.FLOAT, f"{weight.name}_wide")
                self._graph.insert_before(node, _producer(wide))
                node.replace_input_with(1, wide)
        for node in reversed(list(self._graph)):
            if node.op_type == "Cast" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                self._graph.remove(node, safe=True)

    def _moves_low(self, node: ir.Node) -> bool:
        moved = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        return node.op_type in MOVES and bool(moved) and all(v in self._born_low for v in moved)

    def _lower_node(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.FLOAT:
                node.replace_input_with(index, self._low_version(value))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", self._dtype)
        if node.op_type in ("Constant", "ConstantOfShape") and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype == ir.DataType.FLOAT:
                node.attributes["value"] = ir.AttrTensor("value", convert(tensor, self._dtype, node.name or ""))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                self._narrow(value, after=node)

    def _narrow(self, value: ir.Value, *, after: ir.Node) -> None:
        """`value` becomes a value of the narrower type; what read it reads a cast of it."""
        wide = self._cast(value, ir.DataType.FLOAT, f"{value.name}_wide")
        value.dtype = self._dtype
        for user, index in [(use.node, use.idx) for use in value.uses()]:
            if user is not wide.producer():
                user.replace_input_with(index, wide)
        self._insert(wide, after=after)
        self._low[wide] = value
        self._born_low.add(wide)

    def _low_version(self, value: ir.Value) -> ir.Value:
        if value not in self._low:
            if value.is_initializer():
                name = f"{value.name}{self._suffix}"
                assert value.const_value is not None
                low = ir.Value(name=name, type=ir.TensorType(self._dtype), shape=value.shape)
                low.const_value = convert(value.const_value, self._dtype, name)
                self._graph.register_initializer(low)
            else:
                low = self._cast(value, self._dtype, f"{value.name}{self._suffix}")
                self._insert(low, after=value.producer())
            self._low[value] = low
        return self._low[value]

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        result = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
        ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[result], name=f"cast_{name}")
        return result

    def _insert(self, value: ir.Value, *, after: ir.Node | None) -> None:
        """The cast that makes `value` stands right after a node, or first."""
        if after is None:
            self._graph.insert_before(self._graph[0], _producer(value))
        else:
            self._graph.insert_after(after, _producer(value))


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def infer_types(model: ir.Model) -> None:
    """Every value of the main graph and of the functions it calls has its type; GateError names one that has not.

    A function is typed by its calls: all of them must pass the same types.
    """
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # what was known before a rewrite
    _set_types(model.graph, onnx.shape_inference.infer_shapes(proto).graph)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.dtype = value.const_value.dtype
    for identifier, function in model.functions.items():
        calls = [node for node in model.graph if node.op_identifier() == identifier]
        passed = {tuple(None if v is None else v.dtype for v in node.inputs) for node in calls}
        if len(passed) != 1:
            raise GateError(f"function {identifier} is called with different types", got=sorted(map(str, passed)))
        _set_types(function, _inferred_body(function, calls[0], passed.pop()))


def _inferred_body(function: ir.Function, call: ir.Node, types: tuple[ir.DataType | None, ...]) -> onnx.GraphProto:
    """The function's body as a graph, with the attributes and input types of a call, and every type known."""
    nodes = []
    for node in function:
        proto = ir.to_proto(node)
        for attribute in proto.attribute:
            if attribute.ref_attr_name:
                name, value = attribute.name, ir.to_proto(call.attributes[attribute.ref_attr_name])
                attribute.CopyFrom(value)
                attribute.name = name
        nodes.append(proto)
    inputs = [
        onnx.helper.make_tensor_value_info(value.name or "", int(dtype), None)
        for value, dtype in zip(function.inputs, types, strict=True)
        if dtype is not None
    ]
    outputs = [onnx.ValueInfoProto(name=value.name) for value in function.outputs]
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in function.opset_imports.items()]
    body = onnx.helper.make_graph(nodes, function.name, inputs, outputs)
    return onnx.shape_inference.infer_shapes(onnx.helper.make_model(body, opset_imports=imports)).graph


def _set_types(body: Body, inferred: onnx.GraphProto) -> None:
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    for value in (*body.inputs, *(output for node in body for output in node.outputs)):
        if types.get(value.name or ""):
            value.dtype = ir.DataType(types[value.name or ""])
        elif value.dtype is None:
            raise GateError(f"no type is known for {value.name!r}", got=str(value.producer()))
