"""Operations of OpenVINO graphs that call our own CPU kernels on OpenVINO's memory, on its threads.

Bias tables, the item table and other constants belong to an operation and are not its inputs. There are two forms of
the same operations: `NativeOperations`, compiled with the engine for one version of OpenVINO, and `PythonOperations`,
which go with any but cost a tenth of a millisecond a call. Tensors of bfloat16 are uint16 to numpy.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openvino
from openvino import Dimension, PartialShape, Tensor, Type
from openvino.utils.node_factory import NodeFactory

from kernels.cpu.library import BFLOAT16, FLOAT32, INT8
from kernels.hstu_attention.cpu import CANDIDATES, CAUSAL, QUERIES, Attention
from kernels.item_head.cpu import ItemHead
from kernels.projection.cpu import PackedWeight
from serving import time_features
from serving.engine import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCall:
    """One call of a function of the domain `hstu`: its kernel, and the type of its output (int8: with a second
    output, each row's scale).

    The type of its projections is not fixed: OpenVINO may hand over float32 where the graph says bfloat16.
    """

    function: str
    kernel: Attention
    output: Type
    v_offset: int = 0  # of candidates: where v and k stand in the history
    k_offset: int = 0
    layer: int = 0  # whose rows of a cache are meant
    jagged: bool = (
        False  # rows of the history are [1, T, ·], and one more input int32 [B+1] says where each user's start
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadCall:
    """The kernel of an item table, and K."""

    kernel: ItemHead
    results: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectionCall:
    """A product by a packed weight; with `epsilon` of rows that are normalised first."""

    kernel: PackedWeight
    output: Type
    epsilon: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCall:
    """A layer: the projections that attention reads (uvqk, or uq and kv), attention, and W_o with the residual."""

    projections: tuple[ProjectionCall, ...]
    attention: AttentionCall
    output: ProjectionCall


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """Where the inputs of a function of the domain `hstu` stand; bias tables, which are its last two, are constants.

    HSTUAttention(uvqk, buckets, lengths), HSTUQueryAttention(uq, kv, buckets, position) of the last event, whose next
    time is the query time, HSTUCandidateAttention(history, candidates, buckets, lengths), HSTUExtendAttention(uvqk,
    cache, buckets, cached_lengths, lengths) and HSTUExtendQueryAttention(uq, kv, cache, buckets, cached_lengths,
    position).
    """

    mode: int  # of the kernel
    projections: tuple[int, ...]  # the first of them has the query rows
    buckets: int
    feature: str  # of `serving.time_features`: what the buckets are
    cache: int | None = None  # float32 [B, layers, P, W/2], read where it lies

    @property
    def history(self) -> int:
        """Which input has the rows of the history, or what is new of it."""
        return self.projections[-1]


FUNCTIONS = {
    "HSTUAttention": Function(mode=CAUSAL, projections=(0,), buckets=1, feature=time_features.HISTORY_BUCKETS),
    "HSTUQueryAttention": Function(mode=QUERIES, projections=(0, 1), buckets=2, feature=time_features.QUERY_BUCKETS),
    "HSTUCandidateAttention": Function(
        mode=CANDIDATES, projections=(1, 0), buckets=2, feature=time_features.QUERY_BUCKETS
    ),
    "HSTUExtendAttention": Function(
        mode=CAUSAL, projections=(0,), buckets=2, feature=time_features.EXTEND_BUCKETS, cache=1
    ),
    "HSTUExtendQueryAttention": Function(
        mode=QUERIES, projections=(0, 1), buckets=3, feature=time_features.EXTEND_QUERY_BUCKETS, cache=2
    ),
}


_TYPES = {Type.f32: FLOAT32, Type.bf16: BFLOAT16, Type.i8: INT8}


class Operations(Protocol):
    """Makes the operations of a graph."""

    name: str

    def attention(self, inputs: list[Any], call: AttentionCall) -> Any:
        """A node that computes the call of these inputs."""

    def item_head(self, embedding: Any, call: HeadCall) -> Any:
        """A node with the K best items (user_embedding [B, D]) -> scores float32 [B, K], indices int32 [B, K]."""

    def projection(self, inputs: list[Any], call: ProjectionCall) -> Any:
        """A node with the product (rows [.., K], of int8 their scales [.., 1], residual if any [.., N]) -> [.., N]."""

    def layer(self, inputs: list[Any], call: LayerCall) -> Any | None:
        """A node with the whole layer (what each projection reads, residual, attention's inputs after its rows) ->
        float32 of the residual's shape; None where there is no such operation."""


class NativeOperations:
    """Operations compiled with the engine (kernels/cpu/openvino_ops.cpp)."""

    name = "native"

    def __init__(self, path: Path) -> None:
        """Raises RuntimeError when the file is not for this OpenVINO."""
        self._factory = NodeFactory()
        self._factory.add_extension(path)
        self._kept: list[object] = []  # kernels, and the structures whose addresses the operations hold

    def attention(self, inputs: list[Any], call: AttentionCall) -> Any:
        """A node that computes the call of these inputs."""
        function = FUNCTIONS[call.function]
        out_type = _TYPES[call.output]
        prepared = call.kernel.prepared(function.mode, out_type)
        self._kept += [call, prepared]
        attributes = {"call": ctypes.addressof(prepared), "function": call.kernel.function}
        offsets = {"v_offset": call.v_offset, "k_offset": call.k_offset, "layer": call.layer}
        return self._factory.create("HSTUKernelAttention", inputs, attributes | offsets | {"jagged": int(call.jagged)})

    def item_head(self, embedding: Any, call: HeadCall) -> Any:
        """A node with the K best items of each user."""
        prepared = call.kernel.prepared(call.results)
        self._kept += [call, prepared]
        attributes = {"call": ctypes.addressof(prepared), "function": call.kernel.function}
        return self._factory.create("HSTUKernelItemHead", [embedding], attributes)

    def projection(self, inputs: list[Any], call: ProjectionCall) -> Any:
        """A node with the product."""
        prepared = call.kernel.prepared(_TYPES[call.output], call.epsilon)
        self._kept += [call, prepared]
        attributes = {"call": ctypes.addressof(prepared), "function": call.kernel.function}
        return self._factory.create("HSTUKernelProjection", inputs, attributes)

    def layer(self, inputs: list[Any], call: LayerCall) -> Any | None:
        """A node with the whole layer."""
        projections = [p.kernel.prepared(_TYPES[p.output], p.epsilon) for p in (*call.projections, call.output)]
        mode = FUNCTIONS[call.attention.function].mode
        attention = call.attention.kernel.prepared(mode, _TYPES[call.attention.output])
        self._kept += [call, *projections, attention]
        *read, last = map(ctypes.addressof, projections)
        attributes = {
            "first": read[0],
            "second": read[1] if len(read) > 1 else 0,
            "last": last,
            "project": call.output.kernel.function,
            "call": ctypes.addressof(attention),
            "function": call.attention.kernel.function,
            "jagged": int(call.attention.jagged),
        }
        return self._factory.create("HSTUKernelLayer", inputs, attributes)


class PythonOperations:
    """Operations written in Python, for any version of OpenVINO."""

    name = "python"

    def attention(self, inputs: list[Any], call: AttentionCall) -> Any:
        """A node that computes the call of these inputs."""
        return AttentionOp(inputs, call)

    def item_head(self, embedding: Any, call: HeadCall) -> Any:
        """A node with the K best items of each user."""
        return ItemHeadOp([embedding], call)

    def projection(self, inputs: list[Any], call: ProjectionCall) -> Any:
        """A node with the product."""
        return ProjectionOp(inputs, call)

    def layer(self, inputs: list[Any], call: LayerCall) -> Any | None:  # noqa: ARG002
        """None: its parts go with any version of OpenVINO, one by one."""
        return None


class KernelOp(openvino.Op):
    """An operation with a `call`: whatever its kernel needs besides the inputs."""

    def __init__(self, inputs: list[Any] | None = None, call: Any = None) -> None:
        super().__init__(self)
        self.call = call
        self._runs = False
        self._scratch: KernelOp | None = None
        if inputs is not None:
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

    def clone_with_new_inputs(self, inputs: list[Any]) -> KernelOp:
        """The same call of other inputs.

        OpenVINO asks for one at every run of new shapes, to infer those of the outputs, and an operation written in
        Python is never freed: it refers to itself. So an operation that runs has one that is given other inputs.
        """
        if not self._runs or self._scratch is None:
            made = type(self)(inputs, self.call)
            if self._runs:
                self._scratch = made
            return made
        self._scratch.set_arguments(inputs)
        self._scratch.constructor_validate_and_infer_types()
        return self._scratch

    def visit_attributes(self, visitor: Any) -> bool:  # noqa: ARG002
        """Nothing is written to a file: an engine's file is the ONNX."""
        return True

    def has_evaluate(self) -> bool:
        """The CPU plugin runs `evaluate`."""
        return True


class AttentionOp(KernelOp):
    """One attention call of the domain `hstu`."""

    call: AttentionCall

    def validate_and_infer_types(self) -> None:
        """The output has the rows of the query rows, and H·dv columns."""
        shape, output = self.call.kernel.shape, self.call.output
        rows = self.get_input_partial_shape(FUNCTIONS[self.call.function].projections[0])
        self.set_output_size(2 if output == Type.i8 else 1)
        self.set_output_type(0, output, PartialShape([rows[0], rows[1], Dimension(shape.heads * shape.v_dim)]))
        if output == Type.i8:
            self.set_output_type(1, Type.f32, PartialShape([rows[0], rows[1], Dimension(1)]))

    def evaluate(self, outputs: list[Tensor], inputs: list[Tensor]) -> bool:
        """The kernel's answer stands in the outputs."""
        self._runs = True
        function, kernel = FUNCTIONS[self.call.function], self.call.kernel
        arrays = [_array(tensor) for tensor in inputs]
        starts = arrays.pop().astype(np.int64) if self.call.jagged else None
        batch, rows, _ = arrays[function.projections[0]].shape
        outputs[0].shape = [batch, rows, kernel.shape.heads * kernel.shape.v_dim]
        out, scales = _array(outputs[0]), None
        if len(outputs) > 1:
            outputs[1].shape = [batch, rows, 1]
            scales = _array(outputs[1])
        integers = arrays[-1].astype(np.int64)
        if function.cache is not None:
            cached = arrays[function.cache][:, self.call.layer], arrays[-2].astype(np.int64)
            if function.mode == CAUSAL:
                kernel.attention(
                    arrays[0], arrays[2], integers, out=out, out_scales=scales, cache=cached, starts=starts
                )
            else:
                kernel.queries(
                    arrays[0], arrays[1], arrays[3], integers, out=out, out_scales=scales, cache=cached, starts=starts
                )
        elif function.mode == CAUSAL:
            kernel.attention(arrays[0], arrays[1], integers, out=out, out_scales=scales, starts=starts)
        elif function.mode == QUERIES:
            kernel.queries(arrays[0], arrays[1], arrays[2], integers, out=out, out_scales=scales, starts=starts)
        else:
            kernel.candidates(
                arrays[0],
                arrays[1],
                arrays[2],
                integers[:, None],
                out=out,
                out_scales=scales,
                starts=starts,
                v_offset=self.call.v_offset,
                k_offset=self.call.k_offset,
            )
        return True


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
        self._runs = True
        embeddings = inputs[0].data
        for output in outputs:
            output.shape = [len(embeddings), self.call.results]
        self.call.kernel.top_items(embeddings, scores=outputs[0].data, indices=outputs[1].data)
        return True


class ProjectionOp(KernelOp):
    """Rows times a packed weight (rows [.., K], of int8 their scales [.., 1], residual if any [.., N]) -> [.., N]."""

    call: ProjectionCall

    def validate_and_infer_types(self) -> None:
        """As many rows as are given."""
        shape = self.get_input_partial_shape(0)
        shape[shape.rank.get_length() - 1] = Dimension(self.call.kernel.columns)
        self.set_output_type(0, self.call.output, shape)

    def evaluate(self, outputs: list[Tensor], inputs: list[Tensor]) -> bool:
        """The kernel's answer stands in the output."""
        self._runs = True
        rows, *others = (_array(tensor) for tensor in inputs)
        scales = others.pop(0) if rows.dtype == np.int8 else None
        outputs[0].shape = [*rows.shape[:-1], self.call.kernel.columns]
        self.call.kernel.project(
            rows,
            out=_array(outputs[0]),
            row_scales=scales,
            epsilon=self.call.epsilon,
            residual=others[0] if others else None,
        )
        return True


def _array(tensor: Tensor) -> Array:
    """The tensor's memory as numpy; OpenVINO shows bfloat16 as float16, a type that our graphs do not have."""
    data: Array = tensor.data
    return data.view(np.uint16) if data.dtype == np.float16 else data
