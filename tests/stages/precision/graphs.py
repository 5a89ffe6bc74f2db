"""Small hand-written models on which a rewrite can be followed by eye."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

TEXT = """<ir_version: 10, opset_import: ["": 20, "hstu": 1]>
small (int64[B, L] ids, float[B, L, 8] x) => (float[B, L, 6] y)
<float[9, 8] table, float[8, 12] w1, float[12, 6] w2, float[6] bias, float[8] ones>
{
    rows = Gather<axis = 0>(table, ids)
    x1 = Add(rows, x)
    normed = LayerNormalization<axis = -1, epsilon = 0.000001>(x1, ones)
    h = MatMul(normed, w1)
    shape = Constant<value_ints = [0, 0, 12]>()
    moved = Reshape(h, shape)
    gated = hstu.Gate(moved)
    product = MatMul(gated, w2)
    y = Add(product, bias)
}
<domain: "hstu", opset_import: ["": 20]>
Gate (Gate_h) => (Gate_y)
{
    Gate_one = Constant<value = float {1.0}>()
    Gate_like = CastLike(Gate_one, Gate_h)
    Gate_more = Add(Gate_h, Gate_like)
    Gate_y = Mul(Gate_h, Gate_more)
}
"""
NAMES = {  # node names as the exporter writes them: <module>/<operator>
    "rows": "item_embedding/Gather",
    "h": "layers.0.uvqk/MatMul",
    "gated": "layers.0.attention/Gate",
    "product": "layers.0.output/MatMul",
}


def small_model(seed: int = 0) -> ir.Model:
    """Two linears with a function between them, weights drawn from `seed`."""
    rng = np.random.default_rng(seed)
    proto = onnx.parser.parse_model(TEXT)
    values = {
        "table": rng.normal(size=(9, 8)),
        "w1": rng.normal(size=(8, 12)),
        "w2": rng.normal(size=(12, 6)),
        "bias": rng.normal(size=6),
        "ones": np.ones(8),
    }
    del proto.graph.initializer[:]
    for name, value in values.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    for node in proto.graph.node:
        node.name = NAMES.get(node.output[0], f"/{node.output[0]}")
    for node in proto.functions[0].node:
        node.name = f"{node.output[0]}/{node.op_type}"
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def small_feeds(seed: int = 1) -> dict[str, npt.NDArray[np.generic]]:
    rng = np.random.default_rng(seed)
    return {"ids": rng.integers(0, 9, size=(2, 5)), "x": rng.normal(size=(2, 5, 8)).astype(np.float32)}


def run(model: ir.Model, feeds: dict[str, npt.NDArray[np.generic]]) -> npt.NDArray[np.float32]:
    """The model's one output on ONNX Runtime; the checker must find no fault first."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: npt.NDArray[np.float32] = session.run(None, feeds)[0]
    return result


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]
