"""Rows times a packed weight: the fused projection kernel on numpy arrays."""

from __future__ import annotations

import ctypes
import math

import numpy as np

from kernels.cpu.library import BFLOAT16, FLOAT32, INT8, Array, KernelError, Library, address, float_type


class ProjectionCall(ctypes.Structure):
    """`hstu::ProjectionCall` of call.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("depth", "columns", "compute_type")),
        ("weight", ctypes.c_void_p),
        ("weight_type", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("scales", "bias", "packed")),
        ("rows", ctypes.c_int64),
        ("in", ctypes.c_void_p),
        ("in_type", ctypes.c_int64),
        ("in_scales", ctypes.c_void_p),
        ("normalize", ctypes.c_int64),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("residual", "out")),
        *((name, ctypes.c_int64) for name in ("out_type", "threaded")),
    )


class PackedWeight:
    """A weight [K, N] and its bias as the kernel reads them, for the instruction set in use.

    weight float32, uint16 (bf16), or int8 with scales float32 [N]; bias float32 [N]. With `bf16`, rows and weight are
    multiplied in bf16 where the CPU can; int8 weights are multiplied by rows of int8, each with a scale of its own.
    Nothing of what is given is needed afterwards.
    """

    def __init__(
        self,
        library: Library,
        weight: Array,
        *,
        scales: Array | None = None,
        bias: Array | None = None,
        bf16: bool = False,
        threaded: bool = True,
    ) -> None:
        depth, columns = weight.shape
        for vector in (scales, bias):
            if vector is not None and vector.shape != (columns,):
                raise KernelError(f"a vector of {vector.shape} does not fit a weight of {weight.shape}")
        narrow = weight.dtype == np.int8
        if narrow != (scales is not None):
            raise KernelError("scales belong to an int8 weight, and to no other")
        if bf16 and weight.dtype != np.uint16:
            raise KernelError(f"a product in bf16 of a weight of {weight.dtype}")
        self._functions, self._library, self._isa = library.functions, library, library.isa
        compute = INT8 if narrow else BFLOAT16 if bf16 else FLOAT32
        size = self._functions.hstu_projection_bytes(*map(ctypes.c_int64, (depth, columns, compute)))
        self._packed = np.empty(size + 64, dtype=np.uint8)
        self._call = ProjectionCall(
            depth=depth,
            columns=columns,
            compute_type=compute,
            weight=address(weight, weight.dtype),
            weight_type=INT8 if narrow else float_type(weight),
            scales=None if scales is None else address(scales, np.float32),
            bias=None if bias is None else address(bias, np.float32),
            packed=(address(self._packed, np.uint8) + 63) // 64 * 64,
            threaded=threaded,
        )
        self._functions.hstu_projection_pack(ctypes.byref(self._call))
        self._call.weight = self._call.scales = self._call.bias = None

    @property
    def columns(self) -> int:
        """N."""
        return int(self._call.columns)

    def prepared(self, out_type: int, epsilon: float | None) -> ProjectionCall:
        """What does not change from call to call, for a caller that fills in the rest; this object must outlive it."""
        call = ProjectionCall.from_buffer_copy(self._call)
        call.out_type, call.threaded, call.normalize, call.epsilon = out_type, 1, epsilon is not None, epsilon or 0.0
        return call

    @property
    def function(self) -> int:
        """The address of the C function that takes a call."""
        return ctypes.cast(self._functions.hstu_projection, ctypes.c_void_p).value or 0

    def project(
        self,
        rows: Array,
        *,
        out: Array,
        row_scales: Array | None = None,
        epsilon: float | None = None,
        residual: Array | None = None,
        threaded: bool = True,
    ) -> None:
        """out [.., N] is residual + rows W + bias; with `epsilon` of rows that are normalised first.

        rows [.., K] float32, uint16 (bf16), or int8 with row_scales float32 [.., 1]; residual float32 [.., N]; out
        float32 or uint16 (bf16).
        """
        call = self.prepared(float_type(out), epsilon)
        count = math.prod(rows.shape[:-1])
        if rows.shape[-1] != call.depth or out.shape != (*rows.shape[:-1], call.columns):
            raise KernelError(f"{rows.shape} and out {out.shape} do not fit [{call.depth}, {call.columns}]")
        if self._library.isa != self._isa:
            raise KernelError(f"the weight was packed for {self._isa}, and {self._library.isa} is in use")
        if (rows.dtype == np.int8) != (row_scales is not None):
            raise KernelError("row_scales belong to int8 rows, and to no others")
        setattr(call, "in", address(rows, rows.dtype))
        call.rows, call.in_type, call.threaded = count, INT8 if rows.dtype == np.int8 else float_type(rows), threaded
        if row_scales is not None:
            if row_scales.size != count:
                raise KernelError(f"{row_scales.size} scales of {count} rows")
            call.in_scales = address(row_scales, np.float32)
        if residual is not None:
            if residual.shape != out.shape:
                raise KernelError(f"a residual of {residual.shape} for {out.shape}")
            call.residual = address(residual, np.float32)
        call.out = address(out, out.dtype)
        error = self._functions.hstu_projection(ctypes.byref(call))
        if error:
            raise KernelError(f"the projection kernel refuses the call: {error.decode()}")
