"""An entry's ONNX file with its attention as TensorRT's plugin `hstu::HSTUPaddedAttention`, beside the portable one.

    HSTUPaddedAttention(silu [B,L,W], times i64 [B,L], next_times i64 [B,L], lengths i64 [B], position_bias f32 [2N-1],
                        time_bias f32 [129], bucket_edges f32 [129]) -> gated [B,L,H·dv], zero from lengths[b] on

It stands in the place of every call of `hstu::HSTUAttention`, SiLU before it. The kernel finds time buckets by itself,
so what the graph computed of times, [B,L,L] int64, is gone; where the last layer reads it, it is computed for the row
that is read. The other attention functions (queries, candidates, extend) keep their bodies.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from hstu.config import HSTUConfig
from hstu.errors import GateError
from hstu.time_buckets import THRESHOLDS
from kernels.hstu_attention.op import bucket_edges
from kernels.hstu_attention.variants import EPSILON
from stages.onnx_files import read_graph, scope, write_graph
from stages.passes.function_bodies import HISTORY
from stages.passes.functions import DOMAIN

PLUGIN = "HSTUPaddedAttention"
DTYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
SUFFIX = "plugin"
# The parser takes a node for a plugin by the first two, and asks for its ahead-of-time form by the third.
_AS_PLUGIN: dict[str, str | int] = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
_OF_BUCKETS = {"Abs", "Add", "Cast", "Clip", "Div", "Gather", "GreaterOrEqual", "Log", "Sub"}  # each pair by itself


def write_plugin_graph(folder: Path, name: str, config: HSTUConfig) -> tuple[str, str | None]:
    """The file in `folder` that TensorRT is to read for an entry, and the type of what its plugin computes.

    It is `<entry>.plugin.onnx`, made of `<entry>.onnx`; that itself, and no type, where it calls no attention which
    the plugin computes. Weights stay where they are. Raises GateError when the graph is not one that surgery writes.
    """
    model = ir.from_proto(read_graph(folder, name))
    dtype = use_plugin(model, config)
    if dtype is None:
        return f"{name}.onnx", None
    write_graph(ir.to_proto(model), folder, f"{name}.{SUFFIX}")
    return f"{name}.{SUFFIX}.onnx", dtype


def use_plugin(model: ir.Model, config: HSTUConfig) -> str | None:
    """Every call of HSTUAttention is a call of the plugin: fp32, fp16 or bf16, or None when there is no call."""
    calls = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, HISTORY)]
    if not calls:
        return None
    edges = _constant(model, "bucket_edges", bucket_edges(THRESHOLDS).numpy())
    buckets = calls[0].inputs[1]
    rows = calls[0].inputs[0]
    if buckets is None or rows is None or rows.dtype is None or rows.dtype not in DTYPES:
        raise _unknown(calls[0])
    difference, chain = _difference(buckets)
    next_times, times = (_without_axis(side, axis) for side, axis in zip(difference.inputs, (2, 1), strict=True))
    for call in calls:
        if call.inputs[1] is not buckets or abs(call.attributes.get_float("epsilon", 0.0) - EPSILON) > EPSILON / 1e3:
            raise _unknown(call)
        _replace(model, call, [times, next_times], edges, config)
    _gather_before(model, buckets, difference, chain)
    model.graph.sort()
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return DTYPES[rows.dtype]


def _replace(model: ir.Model, call: ir.Node, times: list[ir.Value], edges: ir.Value, config: HSTUConfig) -> None:
    uvqk, _, lengths, *tables = call.inputs
    output = call.outputs[0]
    assert uvqk is not None
    module = scope(call.name or "")
    gate = _node(model, "Sigmoid", f"{module}/silu_gate", [uvqk], uvqk.dtype)
    silu = _node(model, "Mul", f"{module}/silu", [uvqk, gate], uvqk.dtype)
    wide = [
        table if table.dtype == ir.DataType.FLOAT
        else _node(model, "Cast", f"{module}/wide_{place}", [table], ir.DataType.FLOAT, to=ir.DataType.FLOAT.value)
        for place, table in enumerate(tables) if table is not None
    ]  # fmt: skip
    sizes = {"num_heads": config.num_heads, "head_dim": config.v_dim, "max_length": config.max_length}
    inputs = [silu, *times, lengths, *wide, edges]
    plugin = ir.node(PLUGIN, inputs, {**sizes, **_AS_PLUGIN}, domain=DOMAIN, name=f"{module}/{PLUGIN}")
    plugin.outputs[0].type, plugin.outputs[0].shape = output.type, output.shape
    name = output.name
    output.replace_all_uses_with(plugin.outputs[0], replace_graph_outputs=True)
    model.graph.remove(call, safe=True)
    plugin.outputs[0].name = name
    model.graph.append(plugin)


def _difference(buckets: ir.Value) -> tuple[ir.Node, list[ir.Node]]:
    """The Sub of two [B, L] that the buckets are of, and what stands between: each pair computed by itself."""
    chain: list[ir.Node] = []
    pending, found = [buckets], []
    while pending:
        node = pending.pop().producer()
        if node is None or node in chain or node in found:
            continue
        if node.op_type == "Sub" and all(_is_made_by(side, "Unsqueeze") for side in node.inputs):
            found.append(node)
        elif node.op_type in _OF_BUCKETS:
            chain.append(node)
            pending += [value for value in node.inputs if value is not None]
        else:
            raise _unknown(node)
    if len(found) != 1:
        raise _unknown(found[0] if found else None)
    return found[0], chain


def _without_axis(side: ir.Value | None, axis: int) -> ir.Value:
    """The [B, L] of which an Unsqueeze makes one side of a difference of pairs."""
    node = side.producer() if side is not None else None
    if node is not None and node.inputs[0] is not None and node.inputs[1] is not None:
        axes = ir.convenience.get_const_tensor(node.inputs[1])
        if axes is not None and axes.numpy().tolist() in ([axis], [axis - 3]):
            return node.inputs[0]
    raise _unknown(node)


def _gather_before(model: ir.Model, buckets: ir.Value, difference: ir.Node, chain: list[ir.Node]) -> None:
    """Rows that are gathered of all buckets are gathered of the next times instead, if nothing else reads buckets."""
    readers = [usage.node for usage in buckets.uses()]
    if len(readers) != 1 or readers[0].op_type != "GatherND":
        return
    gather = readers[0]
    rows = difference.inputs[0]
    assert rows is not None
    early = ir.node("GatherND", [rows, gather.inputs[1]], gather.attributes, name=f"{gather.name}/next_times")
    early.outputs[0].name, early.outputs[0].type = f"{gather.outputs[0].name}.next_times", rows.type
    model.graph.append(early)
    difference.replace_input_with(0, early.outputs[0])
    for node in (difference, *chain):
        node.outputs[0].shape = None  # it was of all rows
    gather.outputs[0].replace_all_uses_with(buckets)
    model.graph.remove(gather, safe=True)


def _constant(model: ir.Model, name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> ir.Value:
    tensor = ir.tensor(values, name=f"{PLUGIN}.{name}")
    shape = ir.Shape(values.shape)
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _node(
    model: ir.Model, op: str, name: str, inputs: list[ir.Value], dtype: ir.DataType | None, **attributes: int
) -> ir.Value:
    node = ir.node(op, inputs, attributes, name=name)
    output = node.outputs[0]
    output.name, output.shape = name, inputs[0].shape
    output.type = None if dtype is None else ir.TensorType(dtype)
    model.graph.append(node)
    return output


def _is_made_by(value: ir.Value | None, op: str) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == op


def _unknown(node: ir.Node | None) -> GateError:
    return GateError(
        "the attention of this graph is not one that the plugin computes",
        got=f"{node.op_type} {node.name!r}" if node is not None else "buckets that are of no times",
        expected="a call of HSTUAttention as surgery writes it",
        fix="set build-engine.tensorrt_attention: function, and report this",
    )
