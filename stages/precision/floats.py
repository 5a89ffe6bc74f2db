"""fp16 and bf16: linears, attention and tables in the narrow type; what decides ranks stays float32.

Float32 remain: LayerNorm and the residual stream (sums of many layers), the L2 norm, the scores of all items
and the top K (in a narrow type many items would tie), the time buckets (a float32 logarithm that integers put
right), and the linears of `keep_wide`. The item table is stored once, in the narrow type, and read as float32
by the item head.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from stages.onnx_files import scope
from stages.precision.linears import Linear, matches
from stages.precision.regions import lower

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def lower_floats(
    model: ir.Model, dtype: ir.DataType, linears: Sequence[Linear], *, keep_wide: Sequence[str]
) -> dict[str, str]:
    """The model computes in `dtype` wherever that is safe; returns the type of each linear, by name.

    `linears` are those of the model, found before any was quantised: a quantised one takes its int8 operands
    as before, dequantised to `dtype`, and gives its result in it.
    """
    low = [linear for linear in linears if linear.role != "item_head" and not matches(linear, keep_wide)]
    nodes = {linear.node for linear in low}
    heads = {linear.node for linear in linears if linear.role == "item_head"}
    operands = {value.producer() for node in nodes for value in node.inputs if value is not None}
    nodes |= {node for node in operands if node is not None and node.op_type == "DequantizeLinear"}
    lower(
        model,
        dtype,
        chosen=lambda node: node in nodes or _is_attention(node) or _is_lookup(node),
        stored=lambda node: node in heads,
    )
    return {linear.name: dtype.name.lower() if linear in low else "float32" for linear in linears}


def _is_attention(node: ir.Node) -> bool:
    """A call of one of our functions, or a node of an attention that is not one; its LayerNorm stays wide."""
    if node.domain:
        return node.domain == "hstu"
    return scope(node.name or "").endswith("attention") and node.op_type != "LayerNormalization"


def _is_lookup(node: ir.Node) -> bool:
    """A row of an embedding table."""
    return node.op_type == "Gather" and scope(node.name or "").endswith("_embedding")
