"""Q/DQ: the right numbers in the file, the right answer at run time, nobody's answer from the batch's range."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from stages.precision.calibration import Scale
from stages.precision.int8 import quantize, quantize_columns
from stages.precision.linears import find_linears
from stages.precision.lint import lint_precision
from tests.stages.precision.graphs import ops, run, small_feeds, small_model


def scale(value: float) -> Scale:
    return Scale(scale=value, held_out_clipped=0.0, held_out_error=0.0)


def quantized(seed: int = 0) -> ir.Model:
    model = small_model(seed)
    quantize(model, find_linears(model), {"layers.0.uvqk": scale(0.03), "layers.0.output": scale(0.5)})
    return model


def test_columns_use_the_whole_range() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
    weight[:, 3] = 0.0
    values, scales = quantize_columns(weight)
    assert values.dtype == np.int8
    assert values[:, 3].tolist() == [0] * 16
    assert set(np.delete(np.abs(values).max(axis=0), 3).tolist()) <= {126, 127}
    assert np.abs(values * scales - weight).max() <= scales.max() / 2


def test_the_graph_computes_what_its_numbers_say() -> None:
    feeds, model = small_feeds(), quantized()
    weights = {name: value.const_value.numpy() for name, value in small_model().graph.initializers.items()}  # type: ignore[union-attr]

    def q(x: np.ndarray, s: float) -> np.ndarray:
        return np.clip(np.rint(x / np.float32(s)), -128, 127) * np.float32(s)

    def w(name: str) -> np.ndarray:
        values, scales = quantize_columns(weights[name])
        return values * scales

    x1 = weights["table"][feeds["ids"]] + feeds["x"]
    centred = x1 - x1.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    h = q(normed, 0.03) @ w("w1")
    expected = q(h * (h + 1.0), 0.5) @ w("w2") + weights["bias"]
    assert np.abs(run(model, feeds) - expected).max() < 0.5 * 0.5  # half a step of the coarser scale, at most
    assert np.mean(np.abs(run(model, feeds) - expected) < 1e-3) > 0.9


def test_the_file_holds_int8_weights_and_tensorrt_takes_the_graph() -> None:
    model = quantized()
    stored = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert stored["w1_int8"] == stored["w2_int8"] == ir.DataType.INT8
    assert not {"w1", "w2"} & stored.keys()
    assert (ops(model).count("QuantizeLinear"), ops(model).count("DequantizeLinear")) == (2, 4)
    assert not lint_precision(ir.to_proto(model))


def test_a_row_does_not_depend_on_the_batch() -> None:
    model, feeds = quantized(), small_feeds()
    loud = {"ids": feeds["ids"], "x": np.stack([feeds["x"][0], 1000.0 * feeds["x"][1]])}
    np.testing.assert_array_equal(run(model, feeds)[0], run(model, loud)[0])


def test_one_weight_and_one_input_are_quantised_once() -> None:
    model = small_model()
    first = next(linear for linear in find_linears(model) if linear.role == "uvqk")
    again = ir.node("MatMul", [first.input, first.weight], name="layers.0.uvqk/again")
    again.outputs[0].name = "again"
    model.graph.insert_after(first.node, again)
    model.graph.outputs.append(again.outputs[0])
    again.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    linears = find_linears(model)
    assert [linear.name for linear in linears] == ["layers.0.uvqk", "layers.0.uvqk#1", "layers.0.output"]
    quantize(model, linears[:2], {linear.name: scale(0.03) for linear in linears[:2]})
    assert (ops(model).count("QuantizeLinear"), ops(model).count("DequantizeLinear")) == (1, 2)
