"""A graph in a narrow float type becomes one that computes in float32 and rounds where the other would.

ONNX Runtime's CPU provider has no bfloat16 kernels. The graph made here gives it the same numerics:
weights are stored in the narrow type, every result of a narrow operator is rounded to it, and sums inside
a matrix product are float32, as they are on the hardware that has the type.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from stages.precision.regions import MOVES, Body, drop_unused, infer_types


def emulate(model: ir.Model, dtype: ir.DataType) -> None:
    """No operator of the model has operands of `dtype` any more, but Cast; its values still are those of `dtype`."""
    for function in model.functions.values():
        _emulate_body(function, dtype)
    _emulate_body(model.graph, dtype)
    infer_types(model)
    drop_unused(model.graph)


def _emulate_body(body: Body, dtype: ir.DataType) -> None:
    nodes = list(body)
    if isinstance(body, ir.Graph):
        for value in list(body.initializers.values()):
            if value.dtype == dtype:
                _read_as_float(body, value, before=nodes[0])
    for value in body.inputs:
        if value.dtype == dtype:
            value.dtype = ir.DataType.FLOAT
    for node in nodes:
        narrow = [value for value in node.outputs if value.dtype == dtype]
        if node.op_type == "Cast" and narrow:
            _read_as_float(body, narrow[0], after=node)
            continue
        for value in narrow:
            value.dtype = ir.DataType.FLOAT
            if node.op_type not in MOVES | {"Constant", "ConstantOfShape"}:
                _round(body, node, value, dtype)
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == dtype:
                values = attribute.as_tensor().numpy().astype(np.float32)
                node.attributes[name] = ir.AttrTensor(name, ir.Tensor(values, dtype=ir.DataType.FLOAT))


def _read_as_float(body: Body, value: ir.Value, *, after: ir.Node | None = None, before: ir.Node | None = None) -> None:
    """What reads the narrow `value` reads a float32 cast of it."""
    cast = ir.Node(
        "", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT)], name=f"cast_{value.name}_read", num_outputs=1
    )
    cast.outputs[0].name = f"{value.name}_read"
    cast.outputs[0].dtype = ir.DataType.FLOAT
    for use in list(value.uses()):
        if use.node is not cast:
            use.node.replace_input_with(use.idx, cast.outputs[0])
    if after is not None:
        body.insert_after(after, cast)
    elif before is not None:
        body.insert_before(before, cast)


def _round(body: Body, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    """`value`, a float32 result of `node`, is rounded to `dtype`; its name stays with the rounded one."""
    index, name = value.index(), value.name
    exact = node.outputs[index]  # type: ignore[index]
    down = ir.Node("", "Cast", [exact], [ir.AttrInt64("to", dtype)], name=f"round_{name}", num_outputs=1)
    up = ir.Node(
        "", "Cast", [down.outputs[0]], [ir.AttrInt64("to", ir.DataType.FLOAT)], name=f"rounded_{name}", num_outputs=1
    )
    down.outputs[0].name, down.outputs[0].dtype = f"{name}_low", dtype
    up.outputs[0].dtype = ir.DataType.FLOAT
    for use in list(exact.uses()):
        if use.node is not down:
            use.node.replace_input_with(use.idx, up.outputs[0])
    outputs = body.outputs
    for position, output in enumerate(outputs):
        if output is exact:
            outputs[position] = up.outputs[0]
    exact.name, up.outputs[0].name = f"{name}_exact", name
    body.insert_after(node, [down, up])
