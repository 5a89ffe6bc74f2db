"""Whole layers as one operation each, where nothing else reads what stands between their products.

OpenVINO asks an operation of ours for its shapes anew at every call, which costs more than some operations of a small
model; and between two operations no thread of the pool does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serving.engines.openvino_nodes import replace_value
from serving.engines.openvino_ops import FUNCTIONS, AttentionCall, LayerCall, Operations
from serving.engines.openvino_products import Product


def fuse_layers(
    products: list[Product], operations: Operations, call_of: Callable[[Any], AttentionCall | None]
) -> None:
    """Every product with a residual that reads attention, which reads products, is one operation with all of these."""
    by_name = {product.node.get_friendly_name(): product for product in products}
    for output in products:
        attention = output.node.input_value(0).get_node()
        call = call_of(attention)
        if call is None or not output.residual:
            continue
        function = FUNCTIONS[call.function]
        if function.cache is not None or call.v_offset or call.k_offset:
            continue
        inputs, count = attention.input_values(), len(function.projections)
        found = [by_name.get(value.get_node().get_friendly_name()) for value in inputs[:count]]
        read = [product for product in found if product is not None and not product.residual]
        if function.projections != tuple(range(count)) or len(read) < count or len(inputs[count:]) != 2 + call.jagged:
            continue
        between = [attention.output(index) for index in range(attention.get_output_size())] + inputs[:count]
        if any(len(value.get_target_inputs()) != 1 for value in between):
            continue
        fused = LayerCall(projections=tuple(product.call for product in read), attention=call, output=output.call)
        made = operations.layer(
            [*(product.node.input_value(0) for product in read), output.node.input_values()[-1], *inputs[count:]], fused
        )
        if made is not None:
            made.set_friendly_name(output.node.get_friendly_name())
            replace_value(output.node.output(0), made.output(0), "")
