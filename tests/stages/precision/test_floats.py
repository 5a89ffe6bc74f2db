"""fp16 and bf16: what is lowered, what is not, and that the emulated graph rounds where the real one would."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from hstu.errors import GateError, ParameterError
from stages.precision.calibration import Scale
from stages.precision.emulation import emulate
from stages.precision.floats import lower_floats
from stages.precision.int8 import quantize
from stages.precision.linears import find_linears, require_known
from stages.precision.lint import lint_precision
from tests.stages.precision.graphs import ops, run, small_feeds, small_model


def types(model: ir.Model) -> dict[str, str]:
    values = [value for node in model.graph for value in node.outputs]
    return {value.name or "": value.dtype.name for value in values if value.dtype is not None}


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_casts_stand_exactly_at_the_borders(dtype: ir.DataType) -> None:
    model = small_model()
    assert lower_floats(model, dtype, find_linears(model), keep_wide=()) == {
        "layers.0.uvqk": dtype.name.lower(),
        "layers.0.output": dtype.name.lower(),
    }
    low = {name for name, found in types(model).items() if found == dtype.name}
    assert {"rows", "h", "moved", "gated", "product"} <= low  # Reshape moved with what it moves
    assert {name for name, found in types(model).items() if found == "FLOAT"} >= {"x1", "normed", "y"}
    # rows up, normed down, product up: nothing between uvqk and output
    assert ops(model).count("Cast") == 3
    assert {name: value.dtype for name, value in model.graph.initializers.items()} == {
        "ones": ir.DataType.FLOAT,
        "bias": ir.DataType.FLOAT,
        f"table_{dtype.name.lower()}": dtype,
        f"w1_{dtype.name.lower()}": dtype,
        f"w2_{dtype.name.lower()}": dtype,
    }
    assert not lint_precision(ir.to_proto(model))


def test_fp16_is_near_and_wide_linears_stay() -> None:
    feeds, expected = small_feeds(), run(small_model(), small_feeds())
    errors = {}
    for wide in ((), ("output",), ("layers.0.uvqk",)):
        model = small_model()
        found = lower_floats(model, ir.DataType.FLOAT16, find_linears(model), keep_wide=wide)
        assert [name for name, kind in found.items() if kind == "float32"] == [
            linear.name for linear in find_linears(model) if linear.role in wide or linear.module in wide
        ]
        errors[wide] = float(np.abs(run(model, feeds) - expected).max())
    assert 0 < max(errors.values()) < 2e-2 * np.abs(expected).max()


def test_emulated_bf16_rounds_as_bf16_would() -> None:
    feeds = small_feeds()
    model = small_model()
    lower_floats(model, ir.DataType.BFLOAT16, find_linears(model), keep_wide=())
    emulate(model, ir.DataType.BFLOAT16)
    assert all(value.dtype == ir.DataType.BFLOAT16 for name, value in model.graph.initializers.items() if "_bf" in name)

    def rounded(value: np.ndarray) -> np.ndarray:
        return value.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)

    weights = {name: value.const_value.numpy() for name, value in small_model().graph.initializers.items()}  # type: ignore[union-attr]
    x1 = rounded(weights["table"])[feeds["ids"]] + feeds["x"]
    centred = x1 - x1.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    h = rounded(rounded(normed) @ rounded(weights["w1"]))
    gated = rounded(h * rounded(h + 1.0))
    expected = rounded(gated @ rounded(weights["w2"])) + weights["bias"]
    got = run(model, feeds)
    # A sum in another order may round to the neighbour: most are equal, none is further than one step.
    assert np.mean(got == expected) > 0.9
    assert np.abs(got - expected).max() <= 2.0**-7 * np.abs(expected).max()
    assert np.abs(got - run(small_model(), feeds)).max() > 1e-3  # it did round


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_int8_linears_give_the_type_around_them(dtype: ir.DataType) -> None:
    model = small_model()
    linears = find_linears(model)
    quantize(model, linears[:1], {"layers.0.uvqk": Scale(scale=0.03, held_out_clipped=0.0, held_out_error=0.0)})
    found = lower_floats(model, dtype, linears, keep_wide=())
    assert set(found) == {"layers.0.uvqk", "layers.0.output"}
    assert not lint_precision(ir.to_proto(model))
    assert types(model)["h"] == types(model)["product"] == dtype.name
    assert types(model)["normed_dequantized"] == types(model)["w1_dequantized"] == dtype.name
    stored = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert stored["w1_int8"] == ir.DataType.INT8
    assert stored["normed_scale"] == ir.DataType.FLOAT  # QuantizeLinear reads float32
    if dtype == ir.DataType.FLOAT16:
        expected = run(small_model(), small_feeds())
        assert np.abs(run(model, small_feeds()) - expected).max() < 0.05 * np.abs(expected).max()


def test_a_weight_that_does_not_fit_is_named() -> None:
    model = small_model()
    weight = model.graph.initializers["w2"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1e6, name="w2")
    with pytest.raises(GateError, match="w2"):
        lower_floats(model, ir.DataType.FLOAT16, find_linears(model), keep_wide=())


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ParameterError, match=r"layers\.0\.uvqk"):
        require_known(("layers.9.output",), find_linears(small_model()), parameter="build-engine.float_keep_wide")
