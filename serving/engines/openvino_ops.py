"""Operations of OpenVINO graphs that call our own CPU kernels on OpenVINO's memory, on its threads.

Bias tables, the item table and other constants belong to an operation and are not its inputs. Tensors of bfloat16
are uint16 to numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
from openvino import Dimension, PartialShape, Tensor, Type

from kernels.hstu_attention.cpu import Attention
from kernels.item_head.cpu import ItemHead
from serving import time_features
from serving.engine import Array


class KernelOp(openvino.Op):
    """An operation with a `call`: whatever its kernel needs besides the inputs."""

    def __init__(self, inputs: list[Any] | None = None, call: Any = None) -> None:
        super().__init__(self)
        self.call = call
        if inputs is not None:
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

    def clone_with_new_inputs(self, inputs: list[Any]) -> KernelOp:
        """The same call of other inputs."""
        return type(self)(inputs, self.call)

    def visit_attributes(self, visitor: Any) -> bool:  # noqa: ARG002
        """Nothing is written to a file: an engine's file is the ONNX."""
        return True

    def has_evaluate(self) -> bool:
        """The CPU plugin runs `evaluate`."""
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCall:
    """One attention call: its kernel, and the type of its output (None: that of the query rows; int8: with a second
    output, the scale of each row)."""

    kernel: Attention
    output: Type | None = None
    v_offset: int = 0  # of candidates: where v and k stand in the history
    k_offset: int = 0
    layer: int = 0  # whose rows of a cache are meant


class AttentionOp(KernelOp):
    """One attention call of the domain `hstu`."""

    rows_inputs: tuple[int, ...] = (0,)  # which inputs are projections; the first of them has the query rows
    cache_input: int | None = None  # which is a cache
    buckets_input: int
    buckets_feature: str  # of `serving.time_features`
    call: AttentionCall

    def validate_and_infer_types(self) -> None:
        """The output has the rows of the query rows, and H·dv columns."""
        shape, rows_input = self.call.kernel.shape, self.rows_inputs[0]
        rows = self.get_input_partial_shape(rows_input)
        output = self.call.output or self.get_input_element_type(rows_input)
        self.set_output_size(2 if output == Type.i8 else 1)
        self.set_output_type(0, output, PartialShape([rows[0], rows[1], Dimension(shape.heads * shape.v_dim)]))
        if output == Type.i8:
            self.set_output_type(1, Type.f32, PartialShape([rows[0], rows[1], Dimension(1)]))

    def evaluate(self, outputs: list[Tensor], inputs: list[Tensor]) -> bool:
        """The kernel's answer stands in the outputs."""
        arrays = [_array(tensor) for tensor in inputs]
        batch, rows, _ = arrays[self.rows_inputs[0]].shape
        shape = self.call.kernel.shape
        outputs[0].shape = [batch, rows, shape.heads * shape.v_dim]
        scales = None
        if len(outputs) > 1:
            outputs[1].shape = [batch, rows, 1]
            scales = _array(outputs[1])
        self.compute(arrays, _array(outputs[0]), scales)
        return True

    def compute(self, inputs: list[Array], out: Array, scales: Array | None) -> None:
        """`out` (and `scales`, of an int8 output) is what the function gives for the inputs."""
        raise NotImplementedError


class HSTUAttention(AttentionOp):
    """HSTUAttention(uvqk, buckets, lengths)."""

    buckets_input, buckets_feature = 1, time_features.HISTORY_BUCKETS

    def compute(self, inputs: list[Array], out: Array, scales: Array | None) -> None:
        uvqk, buckets, lengths = inputs
        self.call.kernel.attention(uvqk, buckets, lengths.astype(np.int64), out=out, out_scales=scales)


class HSTUQueryAttention(AttentionOp):
    """HSTUQueryAttention(uq, kv, buckets, position) of the last event, whose next time is the query time."""

    rows_inputs = (0, 1)
    buckets_input, buckets_feature = 2, time_features.QUERY_BUCKETS

    def compute(self, inputs: list[Array], out: Array, scales: Array | None) -> None:
        uq, kv, buckets, position = inputs
        self.call.kernel.queries(uq, kv, buckets, position.astype(np.int64), out=out, out_scales=scales)


class HSTUCandidateAttention(AttentionOp):
    """HSTUCandidateAttention(history, candidates, buckets, lengths)."""

    rows_inputs = (1, 0)
    buckets_input, buckets_feature = 2, time_features.QUERY_BUCKETS

    def compute(self, inputs: list[Array], out: Array, scales: Array | None) -> None:
        history, rows, buckets, lengths = inputs
        self.call.kernel.candidates(
            history,
            rows,
            buckets,
            lengths.astype(np.int64)[:, None],
            out=out,
            out_scales=scales,
            v_offset=self.call.v_offset,
            k_offset=self.call.k_offset,
        )


class HSTUExtendAttention(AttentionOp):
    """HSTUExtendAttention(uvqk, cache, buckets, cached_lengths, lengths)."""

    cache_input, buckets_input, buckets_feature = 1, 2, time_features.EXTEND_BUCKETS

    def compute(self, inputs: list[Array], out: Array, scales: Array | None) -> None:
        uvqk, cache, buckets, cached_lengths, lengths = inputs
        prefix = cache[:, self.call.layer], cached_lengths.astype(np.int64)
        lengths = lengths.astype(np.int64)
        self.call.kernel.attention(uvqk, buckets, lengths, out=out, out_scales=scales, cache=prefix)


class HSTUExtendQueryAttention(AttentionOp):
    """HSTUExtendQueryAttention(uq, kv, cache, buckets, cached_lengths, position) of the last event, one a user."""

    rows_inputs = (0, 1)
    cache_input, buckets_input, buckets_feature = 2, 3, time_features.EXTEND_QUERY_BUCKETS

    def compute(self, inputs: list[Array], out: Array, scales: Array | None) -> None:
        uq, kv, cache, buckets, cached_lengths, position = inputs
        kernel, cached_lengths, position = self.call.kernel, cached_lengths.astype(np.int64), position.astype(np.int64)
        if not cached_lengths.any():
            buckets = np.ascontiguousarray(buckets[:, :, cache.shape[2] :])
            kernel.queries(uq, kv, buckets, position, out=out, out_scales=scales)
            return
        # The kernel extends whole rows: those that are not asked for have no u and q, and are dropped again.
        users, values = np.arange(len(uq))[:, None], kernel.shape.heads * kernel.shape.v_dim
        uvqk = np.zeros((*kv.shape[:2], 2 * kv.shape[2]), kv.dtype)
        u, v, q, k = np.split(uvqk, [values, 2 * values, values + kv.shape[2]], axis=2)
        k[:], v[:] = kv[:, :, :-values], kv[:, :, -values:]
        u[users, position], q[users, position] = uq[:, :, :values], uq[:, :, values:]
        every = np.zeros((*kv.shape[:2], buckets.shape[2]), buckets.dtype)
        every[users, position] = buckets
        rows = np.empty((*kv.shape[:2], values), out.dtype)
        row_scales = None if scales is None else np.empty((*kv.shape[:2], 1), np.float32)
        prefix = cache[:, self.call.layer], cached_lengths
        lengths = position.max(axis=1) + 1
        kernel.attention(uvqk, every, lengths, out=rows, out_scales=row_scales, cache=prefix)
        out[:] = rows[users, position]
        if scales is not None and row_scales is not None:
            scales[:] = row_scales[users, position]


ATTENTION: dict[str, type[AttentionOp]] = {
    operation.__name__: operation
    for operation in (
        HSTUAttention,
        HSTUQueryAttention,
        HSTUCandidateAttention,
        HSTUExtendAttention,
        HSTUExtendQueryAttention,
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadCall:
    """The kernel of an item table, and K."""

    kernel: ItemHead
    results: int


class ItemHeadOp(KernelOp):
    """The K best items (user_embedding [B, D]) -> scores float32 [B, K], indices int32 [B, K]."""

    call: HeadCall

    def validate_and_infer_types(self) -> None:
        """As many rows as users."""
        shape = PartialShape([self.get_input_partial_shape(0)[0], Dimension(self.call.results)])
        self.set_output_size(2)
        self.set_output_type(0, Type.f32, shape)
        self.set_output_type(1, Type.i32, shape)

    def evaluate(self, outputs: list[Tensor], inputs: list[Tensor]) -> bool:
        """The kernel's answer stands in the outputs."""
        embeddings = inputs[0].data
        for output in outputs:
            output.shape = [len(embeddings), self.call.results]
        self.call.kernel.top_items(embeddings, scores=outputs[0].data, indices=outputs[1].data)
        return True


def _array(tensor: Tensor) -> Array:
    """The tensor's memory as numpy; OpenVINO shows bfloat16 as float16, a type that our graphs do not have."""
    data: Array = tensor.data
    return data.view(np.uint16) if data.dtype == np.float16 else data
