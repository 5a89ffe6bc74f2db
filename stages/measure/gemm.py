"""The fastest matrix products of this machine, of the model's own shapes, by whichever library has them: the roof."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hstu.config import HSTUConfig
from serving.engine import Array
from stages.measure.statistics import significant

LEAST_ROWS = 512  # fewer would not fill the caches' tiles, and the roof is the best that can be had
LARGE = (512, 1024, 1024)  # large enough to hide what a call costs, which for a small model is most of a product
TRIALS = 6  # of every library and shape in turn, to find the fastest
TURN = 3  # products a turn, of which the fastest counts
ONNX_OPSET, ONNX_IR = 20, 10

Multiply = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """Y [rows, columns] = X [rows, inner] · W [inner, columns] in one precision, W constant and packed beforehand."""

    library: str
    rows: int
    inner: int
    columns: int
    multiply: Multiply

    def __str__(self) -> str:
        return f"{self.library} {self.rows}x{self.inner}x{self.columns}"

    def gflops(self, times: int) -> float:
        """The fastest of some runs, in GFLOP/s (int8: operations likewise, a multiply-add counts two)."""
        fastest = float("inf")
        for _ in range(times):
            started = time.perf_counter()
            self.multiply()
            fastest = min(fastest, time.perf_counter() - started)
        return 2.0 * self.rows * self.inner * self.columns / fastest / 1e9


class Roof:
    """The fastest product of each precision, found among PyTorch, NumPy, ONNX Runtime and OpenVINO.

    The shapes are those of the fused projection [rows, D] · [D, 2H(dqk + dv)] and of the output
    [rows, H·dv] · [H·dv, D], with as many rows as a history is long, and one large product beside them. There is
    none for fp16: CPUs without AVX512-FP16 emulate it.
    """

    def __init__(self, config: HSTUConfig, threads: int) -> None:
        rows = max(LEAST_ROWS, config.max_history)
        shapes = {
            (rows, config.embedding_dim, config.uvqk_dim),
            (rows, config.num_heads * config.v_dim, config.embedding_dim),
            LARGE,
        }
        self.best: dict[str, Product] = {}
        for precision, libraries in LIBRARIES.items():
            found = [
                Product(library=name, rows=shape[0], inner=shape[1], columns=shape[2], multiply=make(*shape, threads))
                for shape in sorted(shapes)
                for name, make in libraries.items()
            ]
            for product in found:
                product.multiply()  # packs the weights
            rates = [max(rates) for rates in zip(*([p.gflops(1) for p in found] for _ in range(TRIALS)), strict=True)]
            self.best[precision] = found[int(np.argmax(rates))]

    def gflops(self) -> dict[str, float]:
        """The rate of each precision now."""
        return {precision: significant(product.gflops(TURN)) for precision, product in self.best.items()}

    def products(self) -> dict[str, str]:
        """Which library and shape each rate is of."""
        return {precision: str(product) for precision, product in self.best.items()}


def _draw(rows: int, inner: int, columns: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, inner)).astype(np.float32), rng.normal(size=(inner, columns)).astype(np.float32)


def _draw_int8(rows: int, inner: int, columns: int) -> tuple[Array, Array]:
    """X uint8, W int8."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (rows, inner), np.uint8), rng.integers(-127, 128, (inner, columns), np.int8)


def _numpy(rows: int, inner: int, columns: int, _threads: int) -> Multiply:
    x, w = _draw(rows, inner, columns)
    return lambda: x @ w


def _torch(dtype: str) -> Callable[[int, int, int, int], Multiply]:
    def make(rows: int, inner: int, columns: int, _threads: int) -> Multiply:
        import torch

        x, w = (torch.as_tensor(values).to(getattr(torch, dtype)) for values in _draw(rows, inner, columns))
        return lambda: torch.mm(x, w)

    return make


def _torch_int8(rows: int, inner: int, columns: int, _threads: int) -> Multiply:
    import torch

    x, w = (torch.as_tensor(values.astype(np.int8)) for values in _draw_int8(rows, inner, columns))
    return lambda: torch._int_mm(x, w)


def _onnxruntime(operator: str) -> Callable[[int, int, int, int], Multiply]:
    def make(rows: int, inner: int, columns: int, threads: int) -> Multiply:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        from serving.engines.onnxruntime import PROVIDER, session_options

        whole = operator == "MatMulInteger"
        x, w = (_draw_int8 if whole else _draw)(rows, inner, columns)
        types = (TensorProto.UINT8, TensorProto.INT32) if whole else (TensorProto.FLOAT, TensorProto.FLOAT)
        graph = helper.make_graph(
            [helper.make_node(operator, ["x", "w"], ["y"])],
            "product",
            [helper.make_tensor_value_info("x", types[0], [rows, inner])],
            [helper.make_tensor_value_info("y", types[1], [rows, columns])],
            [numpy_helper.from_array(w, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=ONNX_IR)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options(threads), providers=[PROVIDER]
        )
        return lambda: session.run(None, {"x": x})

    return make


def _openvino(precision: str) -> Callable[[int, int, int, int], Multiply]:
    def make(rows: int, inner: int, columns: int, threads: int) -> Multiply:
        import openvino
        from openvino import Model, Type, opset13

        from serving.engines.openvino import properties

        x: Any
        if precision == "int8":
            x, w = _draw_int8(rows, inner, columns)
            given = opset13.parameter([rows, inner], Type.u8)
            left = opset13.multiply(opset13.convert(given, "f32"), opset13.constant(np.float32(0.01)))
            scales = opset13.constant(np.full((1, columns), 0.01, np.float32))
            right = opset13.multiply(opset13.convert(opset13.constant(w), "f32"), scales)
            ends = [opset13.constant(np.float32(end)) for end in (0.0, 2.55, 0.0, 2.55)]
            product = opset13.fake_quantize(opset13.matmul(left, right, False, False), *ends, 256)  # u8 again
        else:
            x, w = _draw(rows, inner, columns)
            given = opset13.parameter([rows, inner], Type.f32)
            right = opset13.constant(w)
            if precision == "bf16":
                given = opset13.parameter([rows, inner], Type.bf16)
                right = opset13.constant(openvino.Tensor(Type.bf16, openvino.Shape([inner, columns])))
                x = openvino.Tensor(Type.bf16, openvino.Shape([rows, inner]))
            product = opset13.matmul(given, right, False, False)
        model = Model([opset13.result(product)], [given])
        request = openvino.Core().compile_model(model, "CPU", properties(threads)).create_infer_request()
        return lambda: request.infer({0: x}, share_inputs=True)

    return make


LIBRARIES: Mapping[str, Mapping[str, Callable[[int, int, int, int], Multiply]]] = {
    "fp32": {
        "PyTorch": _torch("float32"),
        "NumPy": _numpy,
        "ONNX Runtime": _onnxruntime("MatMul"),
        "OpenVINO": _openvino("fp32"),
    },
    "bf16": {"PyTorch": _torch("bfloat16"), "OpenVINO": _openvino("bf16")},
    "int8": {"PyTorch": _torch_int8, "ONNX Runtime": _onnxruntime("MatMulInteger"), "OpenVINO": _openvino("int8")},
}
