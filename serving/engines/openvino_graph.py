"""A compiled model's ONNX file as an OpenVINO model, with our kernels where they are faster.

The file is the one every backend gets. What is changed while it is read:

- a call of a function of the domain `hstu` becomes an operation that calls the fused attention kernel;
- what the graph computes of timestamps is replaced by inputs (`serving.time_features`): OpenVINO's CPU plugin
  keeps int64 in int32, which times and the edges of their buckets do not fit;
- the factor √D of item rows is an input, which the engine always feeds the same: as a constant OpenVINO would multiply
  it into a second copy of the table;
- a Reshape that changes nothing keeps a lookup in a bfloat16 table and its cast to float32 apart: as one operation
  they take twice the time;
- scores of all items and their top K become one operation that gives the same K (`kernels.item_head`);
- where attention is bfloat16 and the CPU multiplies it, no cast stands between attention and a float32 product;
- where surgery has packed the rows of events, attention takes them as they are, and where they stand is an input
  (`serving.engines.openvino_packing`);
- products by the layers' weights, with the norm before and the sums after them, are operations of our own where our
  kernel is the faster one (`serving.engines.openvino_products`);
- an int8 product reads rows that our kernels have quantised, each by its own scale, in place of one scale for all rows:
  no row depends on another, and nothing is clipped. Where products are OpenVINO's own, that holds of W_o alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import Dimension, PartialShape, Type, opset13
from openvino.frontend.onnx import ConversionExtension

from hstu.errors import ArtifactError
from kernels.cpu.library import Array, Library
from kernels.hstu_attention.cpu import Attention, Shape
from serving import time_features
from serving.engines import openvino_packing
from serving.engines.openvino_layers import fuse_layers
from serving.engines.openvino_nodes import (
    ancestors,
    chain,
    constant_name,
    data_of,
    replace_value,
    source_of,
    without_casts,
)
from serving.engines.openvino_ops import FUNCTIONS, AttentionCall, HeadCall, Operations
from serving.engines.openvino_products import PackedWeights, replace_products

_TIMES = ("timestamps", "query_time", "cached_timestamps")
_ITEM_SCALE = "item_scale"
_TYPES = {name: Type.u8 for name in time_features.NAMES if name.endswith("_buckets")} | {_ITEM_SCALE: Type.f32}
_CALL = "hstu_call"  # the rt_info under which an operation's number in `_Reader.calls` stands


def read_model(
    path: Path, library: Library, operations: Operations, weights: PackedWeights
) -> tuple[openvino.Model, dict[str, Array]]:
    """The model of an .onnx file, as described above, and the inputs that are always fed the same.

    Raises ArtifactError when the file cannot be read or its graph is not one that surgery writes.
    """
    reader = _Reader(path, library, operations, weights)
    core = openvino.Core()
    for function in FUNCTIONS:
        core.add_extension(ConversionExtension(function, "hstu", reader.convert))
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}: OpenVINO {openvino.__version__} cannot read it",
            got=str(error)[:2000],
            fix="run build-engine again",
        ) from None
    reader.replace_times(model)
    reader.keep_item_table(model)
    reader.use_packed_rows(model)
    reader.separate_lookups(model)
    products = replace_products(
        model.get_ordered_ops(), library.isa, operations, weights, narrow_attention=reader.narrow_attention
    )
    fuse_layers(products, operations, reader.call_of)
    reader.quantize_rows(model)
    reader.replace_item_head(model)
    features = [reader.features[name] for name in sorted(reader.features)]
    model.add_parameters([feature for feature in features if feature.output(0).get_target_inputs()])
    model.validate_nodes_and_infer_types()
    reader.remove_times(model)
    return model, reader.fixed


class _Reader:
    """What is found while one file is read: the inputs that stand for parts of it, and the calls of its operations."""

    def __init__(self, path: Path, library: Library, operations: Operations, weights: PackedWeights) -> None:
        self._path, self._library, self._operations, self._weights = path, library, operations, weights
        self.features: dict[str, Any] = {}
        self.fixed: dict[str, Array] = {}
        self.calls: list[AttentionCall] = []

    def convert(self, node: Any) -> list[Any]:
        """The operation that stands for a call of an attention function."""
        function = node.get_op_type("")
        projections, cache = FUNCTIONS[function].projections, FUNCTIONS[function].cache
        inputs = [node.get_input(index) for index in range(node.get_input_size())]
        tables = [self._table(value) for value in inputs[-2:]]
        inputs = inputs[:-2]
        given = inputs[projections[0]].get_element_type()
        if given not in (Type.f32, Type.bf16):
            raise ArtifactError(
                f"{self._path}: attention in {given.to_string()}", expected="fp32, bf16 or int8 engines"
            )
        narrow = given == Type.bf16 and self._library.isa == "avx512_bf16"
        if narrow:
            for index in projections:  # the kernel rounds what it reads: a cast before it saves nothing
                inputs[index] = without_casts(inputs[index])
        if cache is not None:  # it may be of another type than the rows, and is read where it lies
            inputs[cache] = without_casts(inputs[cache])
        shape = Shape(
            heads=node.get_attribute("num_heads"),
            **{name: node.get_attribute(name) for name in ("qk_dim", "v_dim", "max_length", "epsilon")},
            position_bias=tables[0],
            time_bias=tables[1],
            bf16=narrow,
        )
        offsets = {}
        if function == "HSTUCandidateAttention":
            offsets = {name: node.get_attribute(name) for name in ("v_offset", "k_offset")}
        elif cache is not None:
            offsets = {"layer": node.get_attribute("layer")}
        call = AttentionCall(function=function, kernel=Attention(self._library, shape), output=given, **offsets)
        return [self._attention(inputs, call).output(0)]

    def _attention(self, inputs: list[Any], call: AttentionCall) -> Any:
        """An operation for the call, which `call_of` finds again."""
        made = self._operations.attention(inputs, call)
        made.get_rt_info()[_CALL] = str(len(self.calls))
        self.calls.append(call)
        return made

    def call_of(self, node: Any) -> AttentionCall | None:
        """The call that a node is the operation of, if it is one."""
        info = node.get_rt_info()
        return self.calls[int(info[_CALL].value)] if _CALL in info else None

    def replace_times(self, model: openvino.Model) -> None:
        """Buckets of attention and rows of the gap table are inputs, no longer computed from times."""
        for node in model.get_ordered_ops():
            call = self.call_of(node)
            if call is not None:
                function = FUNCTIONS[call.function]
                node.input(function.buckets).replace_source_output(self._feature(function.feature, 3))
            elif node.get_type_name() == "Gather" and constant_name(node.input_value(0)).startswith("gap_embedding."):
                of_candidates = "candidate_ids" in ancestors(node.input_value(1).get_node())
                name = time_features.CANDIDATE_GAP_ROWS if of_candidates else time_features.GAP_ROWS
                node.input(1).replace_source_output(self._feature(name, 2))

    def keep_item_table(self, model: openvino.Model) -> None:
        """The factor of item rows is an input of a fixed value."""
        for node in model.get_ordered_ops():
            if node.get_type_name() != "Multiply":
                continue
            rows, factor = (without_casts(value).get_node() for value in node.input_values())
            if rows.get_type_name() == "Gather" and constant_name(rows.input_value(0)).startswith("item_embedding."):
                node.input(1).replace_source_output(self._feature(_ITEM_SCALE, 1))
                self.fixed[_ITEM_SCALE] = np.array(data_of(factor), dtype=np.float32).reshape(1)

    def use_packed_rows(self, model: openvino.Model) -> None:
        """Attention reads and gives packed rows, if the graph has any; where they stand is an input."""
        places = openvino_packing.replace_places(model, self._feature)
        if places is None:
            return
        for node in model.get_ordered_ops():
            call = self.call_of(node)
            if call is None:
                continue
            inputs = node.input_values()
            history = FUNCTIONS[call.function].history
            rows = openvino_packing.packed_rows(without_casts(inputs[history]), places)
            inputs[history] = without_casts(rows) if call.kernel.shape.bf16 else rows
            made = self._attention(
                [*inputs, self._feature(openvino_packing.STARTS, 1)], dataclasses.replace(call, jagged=True)
            )
            made.set_friendly_name(node.get_friendly_name())
            if call.function in openvino_packing.GIVES_HISTORY:
                for packed in openvino_packing.packings(node.output(0), places):
                    replace_value(packed, made.output(0), "")
            else:
                replace_value(node.output(0), made.output(0), "")

    def separate_lookups(self, model: openvino.Model) -> None:
        """No cast reads a lookup in a table itself."""
        for node in model.get_ordered_ops():
            if node.get_type_name() == "Gather" and node.get_output_element_type(0) == Type.bf16:
                rank = node.get_output_partial_shape(0).rank.get_length()
                width = node.get_output_partial_shape(0)[rank - 1].get_length()
                readers = node.output(0).get_target_inputs()
                kept = opset13.reshape(node.output(0), np.array([0] * (rank - 1) + [width]), True)
                for reader in readers:
                    reader.replace_source_output(kept.output(0))

    def quantize_rows(self, model: openvino.Model) -> None:
        """An int8 W_o, the product of what attention gives, reads int8 rows that attention has made."""
        for node in model.get_ordered_ops():
            if node.get_type_name() == "MatMul":
                value, passed = source_of(node.input_value(0))
                rows = self.narrow_attention(value) if "FakeQuantize" in passed else None
                if rows is not None:
                    self._quantize_rows(node, rows)

    def narrow_attention(self, value: Any) -> Any | None:
        """An attention that gives `value` as int8 rows and their scales; None when no attention gives it."""
        attention = value.get_node()
        call = self.call_of(attention)
        if call is None:
            return None
        made = self._attention(attention.input_values(), dataclasses.replace(call, output=Type.i8))
        made.set_friendly_name(attention.get_friendly_name())
        return made

    def _quantize_rows(self, node: Any, made: Any) -> None:
        """The product reads int8 rows from attention itself; its result is multiplied by the rows' scales."""
        # OpenVINO multiplies in int8 what a cast and a constant scale make of int8 (a scale of 1 it would drop).
        rows = opset13.multiply(opset13.convert(made.output(0), Type.f32), np.float32(1 / 128))
        product = opset13.matmul(rows, _float32_weight(node.input_value(1)), False, False)
        scaled = opset13.multiply(product, opset13.multiply(made.output(1), np.float32(128))).output(0)
        for reader in node.output(0).get_target_inputs():
            if reader.get_node().get_type_name() == "Convert" and reader.get_node().get_element_type() == Type.f32:
                replace_value(
                    reader.get_node().output(0), scaled, ""
                )  # no rounding to the graph's float type in between
        given = node.get_output_element_type(0)
        replace_value(node.output(0), scaled if given == Type.f32 else opset13.convert(scaled, given).output(0), "")

    def replace_item_head(self, model: openvino.Model) -> None:
        """The exact top K comes from the kernel, where the graph scores with the item table itself."""
        for node in model.get_ordered_ops():
            if node.get_type_name() != "TopK":
                continue
            found = _item_head(node)
            if found is None:
                continue
            embedding, table, factors = found
            head = HeadCall(
                kernel=self._weights.item_head(table, factors),
                results=node.output(0).get_partial_shape()[1].get_length(),
            )
            made = self._operations.item_head(embedding, head)
            made.set_friendly_name(node.get_friendly_name())
            replace_value(node.output(0), made.output(0), node.get_friendly_name())
            index_type = node.output(1).get_element_type()
            replace_value(node.output(1), opset13.convert(made.output(1), index_type).output(0), "")

    def remove_times(self, model: openvino.Model) -> None:
        """Times are no inputs; ArtifactError names a value that the answers depend on and that comes from them."""
        alive = {node.get_friendly_name() for node in model.get_ordered_ops()}
        for parameter in model.get_parameters():
            if parameter.get_friendly_name() not in _TIMES:
                continue
            readers = [reader.get_node() for reader in parameter.output(0).get_target_inputs()]
            wrong = [
                reader.get_friendly_name()
                for reader in readers
                if reader.get_type_name() != "ShapeOf" and reader.get_friendly_name() in alive
            ]
            if wrong:
                raise ArtifactError(
                    f"{self._path}: OpenVINO would compute with {parameter.get_friendly_name()} in int32",
                    got=f"read by {', '.join(wrong)}",
                    expected="times read by attention and the gap table alone, as surgery leaves them",
                    fix="run surgery with attention_function, then build-engine again",
                )
            shape = next(p for p in model.get_parameters() if p.get_friendly_name() == "item_ids").output(0)
            if parameter.get_friendly_name() == "timestamps":  # of which the graph may ask how many there are
                for reader in parameter.output(0).get_target_inputs():
                    reader.replace_source_output(shape)
            if not parameter.output(0).get_target_inputs():
                model.remove_parameter(parameter)

    def _feature(self, name: str, rank: int) -> Any:
        if name not in self.features:
            parameter = opset13.parameter(PartialShape([Dimension()] * rank), _TYPES.get(name, Type.i32), name)
            parameter.output(0).get_tensor().set_names({name})
            self.features[name] = parameter
        return self.features[name].output(0)

    def _table(self, value: Any) -> Array:
        """A bias table as float32, whatever type the file stores it in."""
        node = without_casts(value).get_node()
        if node.get_type_name() != "Constant":
            raise ArtifactError(f"{self._path}: a bias table is computed, not stored", got=node.get_friendly_name())
        data = data_of(node)
        if data.dtype == np.uint16:
            return (data.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(data, dtype=np.float32)


def _item_head(top_k: Any) -> tuple[Any, Array, Array] | None:
    """(user embedding, table [V, D], factors [V]) of TopK((user · tableᵀ without row 0) · factors), if that it is."""
    scores = top_k.input_value(0).get_node()
    if scores.get_type_name() != "Multiply" or scores.input_value(1).get_node().get_type_name() != "Constant":
        return None
    factors = data_of(scores.input_value(1).get_node())
    products = next((node for node in chain(scores) if node.get_type_name() == "MatMul"), None)
    if products is None or not constant_name(products.input_value(1)):
        return None
    table = data_of(without_casts(products.input_value(1)).get_node())
    if factors.dtype != np.float32 or factors.shape != (len(table) - 1,):
        return None
    return products.input_value(0), table[1:], factors


def _float32_weight(value: Any) -> Any:
    """A weight int8 [K, N] times its scales, in float32 whatever float type the graph multiplies it in."""
    scaled = value.get_node()
    quantized, _ = source_of(scaled.input_value(0))
    return opset13.multiply(opset13.convert(quantized, Type.f32), opset13.convert(scaled.input_value(1), Type.f32))
