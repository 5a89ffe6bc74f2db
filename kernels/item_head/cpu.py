"""The exact top K of a whole corpus, read in int8: the fused kernel on numpy arrays."""

from __future__ import annotations

import ctypes

import numpy as np

from kernels.cpu.library import Array, KernelError, Library, address, float_type


class HeadCall(ctypes.Structure):
    """`hstu::HeadCall` of call.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("items", "dim")),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("table_type", "row_stride")),
        *((name, ctypes.c_void_p) for name in ("factors", "packed")),
        *((name, ctypes.c_int64) for name in ("users", "results")),
        *((name, ctypes.c_void_p) for name in ("embeddings", "scores", "indices")),
        ("threaded", ctypes.c_int64),
    )


class ItemHead:
    """The K best rows of a table for each user, as `naive.top_items` finds them.

    table float32 or uint16 (bf16) [V, D]; factors float32 [V] (such as reciprocal norms) multiply the scores. A copy
    of the table in int8 is made; the table itself is read where the copy cannot decide, so it must stay as it is.
    """

    def __init__(self, library: Library, table: Array, factors: Array, *, threaded: bool = True) -> None:
        items, dim = table.shape
        if factors.shape != (items,):
            raise KernelError(f"{factors.shape} factors do not fit a table of {items} items")
        self._kept = (table, factors)
        self._functions = library.functions
        size = self._functions.hstu_item_head_bytes(ctypes.c_int64(items), ctypes.c_int64(dim))
        self._packed = np.empty(size + 64, dtype=np.uint8)
        self._call = HeadCall(
            items=items,
            dim=dim,
            table=address(table, table.dtype),
            table_type=float_type(table),
            row_stride=dim,
            factors=address(factors, np.float32),
            packed=(address(self._packed, np.uint8) + 63) // 64 * 64,
            threaded=threaded,
        )
        self._isa = library.isa
        self._library = library
        self._functions.hstu_item_head_pack(ctypes.byref(self._call))

    def prepared(self, results: int) -> HeadCall:
        """What does not change from call to call, for a caller that fills in the rest; this object must outlive it."""
        call = HeadCall.from_buffer_copy(self._call)
        call.results, call.threaded = results, 1
        return call

    @property
    def function(self) -> int:
        """The address of the C function that takes a call."""
        return ctypes.cast(self._functions.hstu_item_head_top, ctypes.c_void_p).value or 0

    def top_items(self, embeddings: Array, *, scores: Array, indices: Array, threaded: bool = True) -> None:
        """scores float32 [B, K] (falling) and indices int32 [B, K] are those of the best rows for embeddings [B, D].

        A user whose embedding is not finite gets scores of NaN.
        """
        if embeddings.shape[1] != self._call.dim or scores.shape != indices.shape or len(scores) != len(embeddings):
            raise KernelError(f"{embeddings.shape}, {scores.shape} and {indices.shape} do not fit the table")
        if scores.shape[1] > self._call.items:
            raise KernelError(f"{scores.shape[1]} results of {self._call.items} items")
        if self._library.isa != self._isa:
            raise KernelError(f"the table was packed for {self._isa}, and {self._library.isa} is in use")
        call = HeadCall.from_buffer_copy(self._call)
        call.users, call.results, call.threaded = len(embeddings), scores.shape[1], threaded
        call.embeddings = address(embeddings, np.float32)
        call.scores, call.indices = address(scores, np.float32), address(indices, np.int32)
        self._functions.hstu_item_head_top(ctypes.byref(call))
