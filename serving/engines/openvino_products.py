"""Products by the layers' weights, with all that stands around them, as one operation of ours each.

    LayerNorm? -> (round to bf16 | quantise, each row by its own scale) -> product -> + bias? -> + residual?

A weight is packed once for all entries of an engine; OpenVINO packs weights anew for every model. Which products are
ours is a rule (`takes`), not a timing, so an engine is the same one on machines of one kind.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from openvino import Type, opset13

from kernels.cpu.library import Array, Library
from kernels.item_head.cpu import ItemHead
from kernels.projection.cpu import PackedWeight
from serving.engines.openvino_nodes import constant_name, data_of, replace_value, source_of, without_casts
from serving.engines.openvino_ops import Operations, ProjectionCall

_MOVES = ("Gather", "Transpose")  # of whole rows, which may as well be normalised afterwards


class PackedWeights:
    """What an engine's entries have packed in common, by what it is made of."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._packed: dict[tuple[object, ...], PackedWeight] = {}
        self._heads: dict[tuple[object, ...], ItemHead] = {}

    def __len__(self) -> int:
        """How many weights are packed."""
        return len(self._packed)

    def packed(self, name: str, weight: Array, *, scales: Array | None, bias: Array | None, bf16: bool) -> PackedWeight:
        """The weight [K, N] of a name and its bias, packed when they are first asked for."""
        sums = tuple(
            None if array is None else zlib.crc32(array.view(np.uint8).data) for array in (weight, scales, bias)
        )
        key = (name, weight.shape, str(weight.dtype), bf16, *sums)
        if key not in self._packed:
            self._packed[key] = PackedWeight(self._library, weight, scales=scales, bias=bias, bf16=bf16)
        return self._packed[key]

    def item_head(self, table: Array, factors: Array) -> ItemHead:
        """The item head of a table [V, D] and its factors [V], which the entries of an engine have in common."""
        key = (
            table.shape,
            str(table.dtype),
            zlib.crc32(factors.data),
            zlib.crc32(table[: 1 << 10].view(np.uint8).data),
        )
        if key not in self._heads:
            self._heads[key] = ItemHead(self._library, table, factors)
        return self._heads[key]


def takes(isa: str, compute: Type) -> bool:
    """Whether our kernel multiplies in this type on this instruction set; where not, OpenVINO's own does."""
    return isa == "avx512_bf16" or (compute == Type.f32 and isa == "avx512")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weight:
    name: str
    values: Array  # [K, N] float32, bf16 as uint16, or int8
    scales: Array | None
    compute: Type  # of the product: f32, bf16 or i8


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """An operation of ours for a product; with `residual` the last of its inputs is added to it."""

    node: Any
    call: ProjectionCall
    residual: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ending:
    """The last value of a product and what is added to it."""

    value: Any
    bias: Array | None = None
    residual: Any = None


def replace_products(
    nodes: list[Any],
    isa: str,
    operations: Operations,
    weights: PackedWeights,
    narrow_attention: Callable[[Any], Any | None],
) -> list[Product]:
    """Every product by a layer's weight that `takes` allows is an operation of ours; these are returned.

    narrow_attention(value) is a node that gives the int8 rows and scales that stand for an attention's output, or None
    when the value is no such output.
    """
    products = []
    for node in nodes:
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_b"]:
            continue
        weight = _weight(node)
        if weight is None or not takes(isa, weight.compute):
            continue
        ending = _ending(node)
        rows = node.input_value(0)
        narrow = None
        if weight.compute == Type.i8:
            rows = _before_quantization(rows)
            narrow = narrow_attention(without_casts(rows))
        rows = without_casts(rows)  # the kernel rounds what it reads
        inputs, epsilon = [rows], None
        if narrow is not None:
            inputs = [narrow.output(0), narrow.output(1)]
        else:
            normalized = _normalized(rows)
            if normalized is not None:
                inputs, epsilon = [normalized[0]], normalized[1]
        if ending.residual is not None:
            inputs.append(ending.residual)
        call = ProjectionCall(
            kernel=weights.packed(
                weight.name, weight.values, scales=weight.scales, bias=ending.bias, bf16=weight.compute == Type.bf16
            ),
            output=ending.value.get_element_type(),
            epsilon=epsilon,
        )
        made = operations.projection(inputs, call)
        made.set_friendly_name(node.get_friendly_name())
        replace_value(ending.value, made.output(0), "")
        products.append(Product(node=made, call=call, residual=ending.residual is not None))
    return products


def _weight(product: Any) -> _Weight | None:
    """What a product multiplies by, if that is a weight of a layer."""
    value = without_casts(product.input_value(1))
    scales = None
    if value.get_node().get_type_name() == "Multiply":  # (int8 - 0) · scales
        scaled = value.get_node()
        value, _ = source_of(value)
        scales = data_of(_constant(scaled.input_value(1))).reshape(-1)
        if scales.dtype == np.uint16:
            scales = (scales.astype(np.uint32) << 16).view(np.float32)
    name = constant_name(value)
    if not name.startswith("layers."):
        return None
    values = data_of(value.get_node())
    if (scales is not None) != (values.dtype == np.int8) or values.ndim != 2:
        return None
    compute = Type.i8 if scales is not None else product.get_output_element_type(0)
    return _Weight(name=name, values=values, scales=scales, compute=compute)


def _constant(value: Any) -> Any:
    """The constant that a value is, casts and shapes aside."""
    node = value.get_node()
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return node


def _before_quantization(rows: Any) -> Any:
    """What a pair of quantise and dequantise reads."""
    value = rows
    while value.get_node().get_type_name() in ("Convert", "Subtract", "Multiply"):
        value = value.get_node().input_value(0)
    assert value.get_node().get_type_name() == "FakeQuantize", value.get_node().get_friendly_name()
    return value.get_node().input_value(0)


def _normalized(rows: Any) -> tuple[Any, float] | None:
    """(x, epsilon) when `rows` is LayerNorm(x) without weights, or rows chosen from that; None when it is not."""
    moves = []
    node = rows.get_node()
    while node.get_type_name() in _MOVES:
        moves.append(node)
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Multiply" and _is_one(node.input_value(1)):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MVN":
        return None
    attributes = node.get_attributes()
    if attributes["eps_mode"].lower() != "inside_sqrt" or not attributes["normalize_variance"]:
        return None
    value = node.input_value(0)
    for move in reversed(moves):
        if move.get_type_name() == "Gather":
            value = opset13.gather(value, move.input_value(1), move.input_value(2)).output(0)
        else:
            value = opset13.transpose(value, move.input_value(1)).output(0)
    return value, float(attributes["eps"])


def _is_one(value: Any) -> bool:
    node = value.get_node()
    return node.get_type_name() == "Constant" and bool((node.data == 1).all())


def _ending(product: Any) -> _Ending:
    """The product, or the sum of it, a bias and a residual that alone is read."""
    found = _Ending(value=product.output(0))
    value, bias, cast = found.value, None, False
    while True:
        readers = list(value.get_target_inputs())
        if len(readers) != 1:
            return found
        node = readers[0].get_node()
        kind = node.get_type_name()
        if kind == "Convert" and node.get_output_element_type(0) == Type.f32 and not cast and bias is None:
            value, cast = node.output(0), True
            continue
        if kind != "Add" or node.get_output_element_type(0) != Type.f32:
            return found
        other = node.input_value(1 - readers[0].get_index())
        value = node.output(0)
        if bias is None and other.get_node().get_type_name() == "Constant":
            bias = np.ascontiguousarray(other.get_node().data, dtype=np.float32).reshape(-1)
            if bias.shape != (product.get_output_partial_shape(0)[-1].get_length(),):
                return found
            found = _Ending(value=value, bias=bias)
        elif other.get_partial_shape().rank == value.get_partial_shape().rank and other.get_element_type() == Type.f32:
            return _Ending(value=value, bias=bias, residual=other)
        else:
            return found
