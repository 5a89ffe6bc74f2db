"""One calibration for every backend: TensorRT's graph and the CPU's differ in the type around int8 alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from hstu.artifact import Artifact
from hstu.signature import EntryName
from stages.engine_targets import TARGETS
from stages.precision.calibration import storable
from stages.precision.recipe import Recipe, lower_entry
from tests.models import TINY, random_histories


def lowered(surgered: Artifact, name: EntryName, around: str, *, emulated: bool) -> tuple[ir.Model, dict[str, object]]:
    recipe = Recipe(
        precision="int8",
        around=around,
        float_keep_wide=("logits",),
        int8_keep_wide=("hidden", "logits"),
        method="percentile",
        percentile=99.99,
    )
    return lower_entry(surgered.path, name, TINY, recipe, random_histories(num_users=16), emulated=emulated)


def quantisation(model: ir.Model) -> dict[str, np.ndarray]:
    """Stored int8 weights, and every scale that a quantiser or its counterpart reads, as float32 values, by name."""
    found: dict[str, np.ndarray] = {}
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for value in node.inputs[:2]:
                source = value
                while source is not None and (producer := source.producer()) is not None and producer.op_type == "Cast":
                    source = producer.inputs[0]
                if source is not None and source.const_value is not None:
                    name = (source.name or "").removesuffix("_float16").removesuffix("_bfloat16")
                    found[f"{node.op_type} {name}"] = source.const_value.numpy().astype(np.float32)
    return found


@pytest.mark.parametrize("name", ["retrieve", "rank", "extend"])
def test_every_backend_gets_the_same_int8(surgered: Artifact, name: EntryName) -> None:
    arounds = {target.around_int8 for target in TARGETS.values()}
    assert arounds == {"fp32", "fp16", "bf16"}
    models = {around: lowered(surgered, name, around, emulated=False) for around in sorted(arounds)}
    models["bf16 on ONNX Runtime"] = lowered(surgered, name, "bf16", emulated=True)
    first, facts = models["fp32"]
    expected = quantisation(first)
    assert sum(key.startswith("QuantizeLinear") for key in expected) >= 3
    for around, (model, told) in models.items():
        assert told["scales"] == facts["scales"], around
        found = quantisation(model)
        assert found.keys() == expected.keys(), around
        for key, values in expected.items():
            np.testing.assert_array_equal(found[key], values, err_msg=f"{around} {key}")


def test_a_scale_is_the_same_number_in_every_float_type() -> None:
    import ml_dtypes

    scales = np.exp(np.random.default_rng(0).uniform(np.log(1e-4), np.log(10.0), size=5000)).astype(np.float32)
    rounded = storable(scales)
    assert (rounded >= scales).all()
    assert (rounded / scales).max() < 1.008
    np.testing.assert_array_equal(storable(rounded), rounded)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        np.testing.assert_array_equal(rounded.astype(dtype).astype(np.float32), rounded)
