"""Every known mistake, planted in a legal graph, is found and named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from stages.precision.lint import lint_precision
from tests.stages.precision.test_int8 import quantized


def node(model: onnx.ModelProto, op_type: str, index: int = 0) -> onnx.NodeProto:
    return [n for n in model.graph.node if n.op_type == op_type][index]


def replace(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))


def unsigned_activation(model: onnx.ModelProto) -> None:
    replace(model, node(model, "QuantizeLinear").input[2], np.array(128, np.uint8))


def no_zero_point(model: onnx.ModelProto) -> None:
    del node(model, "QuantizeLinear").input[2]


def asymmetric_weight(model: onnx.ModelProto) -> None:
    replace(model, "w1_zero", np.full(12, 3, np.int8))


def scales_per_row(model: onnx.ModelProto) -> None:
    dequantize = next(n for n in model.graph.node if n.input[0] == "w1_int8")
    dequantize.attribute[0].i = 0
    replace(model, "w1_scale", np.ones(8, np.float32))
    replace(model, "w1_zero", np.zeros(8, np.int8))


def negative_scale(model: onnx.ModelProto) -> None:
    replace(model, "w2_scale", -np.ones(6, np.float32))


def quantised_bias(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(6, np.int32), "bias_int32"))
    dequantize = onnx.helper.make_node(
        "DequantizeLinear", ["bias_int32", node(model, "QuantizeLinear").input[1]], ["bias_float"], name="bias_dq"
    )
    model.graph.node.insert(0, dequantize)
    node(model, "Add", 1).input[1] = "bias_float"


def quantised_output(model: onnx.ModelProto) -> None:
    scale, zero = node(model, "QuantizeLinear").input[1:]
    add = node(model, "Add", 1)
    position = list(model.graph.node).index(add)
    q = onnx.helper.make_node("QuantizeLinear", [add.input[0], scale, zero], ["out_q"], name="out_q")
    dq = onnx.helper.make_node("DequantizeLinear", ["out_q", scale, zero], ["out_dq"], name="out_dq")
    add.input[0] = "out_dq"
    model.graph.node.insert(position, dq)
    model.graph.node.insert(position, q)


def mixed_types(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "bias")
    replace(model, "bias", onnx.numpy_helper.to_array(weight).astype(np.float16))


def mixed_types_in_a_function(model: onnx.ModelProto) -> None:
    body = model.functions[0].node
    add = next(n for n in body if n.op_type == "Add")
    cast = onnx.helper.make_node(
        "Cast", [add.input[1]], ["Gate_half"], name="Gate_half/Cast", to=onnx.TensorProto.FLOAT16
    )
    add.input[1] = "Gate_half"
    body.insert(list(body).index(add), cast)


def scale_from_the_batch(model: onnx.ModelProto) -> None:
    quantize = node(model, "QuantizeLinear")
    dynamic = onnx.helper.make_node(
        "DynamicQuantizeLinear", [quantize.input[0]], ["dq_y", "dq_s", "dq_z"], name="dynamic"
    )
    model.graph.node.insert(list(model.graph.node).index(quantize), dynamic)
    quantize.input[1] = "dq_s"


PLANTED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "unsigned activation": (unsigned_activation, "unsigned"),
    "no zero point, which means uint8": (no_zero_point, "unsigned"),
    "asymmetric weight": (asymmetric_weight, "asymmetric"),
    "weight scales along the summed axis": (scales_per_row, "weight-scale"),
    "negative scale": (negative_scale, "scale"),
    "quantised bias": (quantised_bias, "weight-type"),
    "quantised output": (quantised_output, "dq-reader"),
    "mixed types": (mixed_types, "mixed-types"),
    "mixed types in a function": (mixed_types_in_a_function, "mixed-types"),
    "scale from the batch": (scale_from_the_batch, "operator"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(name: str) -> None:
    plant, rule = PLANTED[name]
    model = ir.to_proto(quantized())
    assert not lint_precision(model)
    plant(model)
    assert rule in {finding.rule for finding in lint_precision(model)}
