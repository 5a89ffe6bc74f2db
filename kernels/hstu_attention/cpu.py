"""The fused attention kernel on numpy arrays (float32, or uint16 holding bf16), all contiguous."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from kernels.cpu.library import INT8, Array, KernelError, Library, address, float_type

CAUSAL, CANDIDATES, QUERIES = 0, 1, 2  # hstu::Mode of call.h
_BUCKET_BYTES = {np.dtype(t): np.dtype(t).itemsize for t in (np.uint8, np.int32, np.int64)}


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("batch_stride", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
    )


class Call(ctypes.Structure):
    """`hstu::Call` of call.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "queries", "heads", "qk_dim", "v_dim", "max_length")),
        ("prefix_rows", ctypes.c_int64),
        *((name, _Rows) for name in ("u", "v", "q", "k", "prefix_v", "prefix_k")),
        *((name, ctypes.c_void_p) for name in ("lengths", "prefix_lengths", "own_lengths", "positions")),
        *((name, ctypes.c_int64) for name in ("position_row_stride", "position_batch_stride")),
        *((name, ctypes.c_void_p) for name in ("position_bias", "time_bias", "buckets")),
        *((name, ctypes.c_int64) for name in ("bucket_row_stride", "bucket_batch_stride", "own_bucket_column")),
        ("own_buckets", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("own_bucket_row_stride", "own_bucket_batch_stride")),
        ("mask", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mask_row_stride", "mask_batch_stride")),
        *((name, ctypes.c_void_p) for name in ("out", "out_scales")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("mode", "in_type", "out_type", "compute_type")),
        *((name, ctypes.c_int64) for name in ("prefix_type", "prefix_activated", "bucket_type", "threaded")),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What all calls of one layer share. position_bias float32 [2N-1], time_bias float32 [129]; bf16: products of
    queries, keys, weights and values in bf16 (sums in float32), where the CPU can."""

    heads: int
    qk_dim: int
    v_dim: int
    max_length: int
    position_bias: Array
    time_bias: Array
    epsilon: float = 1e-6
    bf16: bool = False


class Attention:
    """The attention of one layer. `out` [B, Q, H·dv] may be float32, uint16 (bf16), or int8 with `out_scales`
    float32 [B, Q]: row = scale · int8 values, the largest of which is 127. Raises KernelError for calls that make
    no sense.

    With `starts` int64 [B+1] the rows of a history are jagged: [1, T, ·], user b's at starts[b] .. starts[b+1], and
    what is said below of [B, L, ·] holds of them; buckets stay [B, ·, L]."""

    def __init__(self, library: Library, shape: Shape) -> None:
        if len(shape.position_bias) != 2 * shape.max_length - 1 or len(shape.time_bias) != 129:
            raise KernelError(f"bias tables of {len(shape.position_bias)} and {len(shape.time_bias)} values do not fit")
        self.shape = shape
        self._function = library.functions.hstu_attention
        self._hv, self._hqk = shape.heads * shape.v_dim, shape.heads * shape.qk_dim
        self._template = Call(
            heads=shape.heads, qk_dim=shape.qk_dim, v_dim=shape.v_dim, max_length=shape.max_length,
            position_bias=address(shape.position_bias, np.float32), time_bias=address(shape.time_bias, np.float32),
            epsilon=shape.epsilon, compute_type=int(shape.bf16), own_bucket_column=-1,
        )  # fmt: skip

    def prepared(self, mode: int, out_type: int) -> Call:
        """What does not change from call to call, for a caller that fills in the rest; this object must outlive it."""
        call = Call.from_buffer_copy(self._template)
        call.mode, call.out_type, call.threaded = mode, out_type, 1
        return call

    @property
    def function(self) -> int:
        """The address of the C function that takes a call."""
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def attention(
        self,
        uvqk: Array,
        buckets: Array | None,
        lengths: Array | None,
        *,
        out: Array,
        out_scales: Array | None = None,
        cache: tuple[Array, Array] | None = None,
        mask: Array | None = None,
        starts: Array | None = None,
        threaded: bool = True,
    ) -> None:
        """`out` holds the gated output of rows uvqk [B, Q, W], before SiLU, that see the rows up to themselves.

        lengths int64 [B]; rows after them become zero. buckets uint8, int32 or int64 [B, Q, Q]; mask uint8
        [B, Q, Q], zero forbids. With `cache` (k and v after SiLU [B, P, H·(dqk+dv)], lengths int64 [B]) the rows
        extend a history: they see the cached rows too, and buckets and mask are [B, Q, P + Q] and [B, Q, T],
        the latter over all keys in order of position.
        """
        hv, hqk = self._hv, self._hqk
        call = self._call(uvqk, (0, hv, 2 * hv, 2 * hv + hqk), 2 * (hv + hqk), out, out_scales, buckets, threaded)
        if lengths is not None:
            call.lengths = address(lengths, np.int64)
        if starts is not None:
            if lengths is None:
                raise KernelError("jagged rows need the lengths of their histories")
            call.batch, call.queries = len(lengths), int(lengths.max(initial=0))
            for rows in (call.u, call.v, call.q, call.k):
                rows.starts = _starts(starts, call.batch, uvqk)
        if mask is not None:
            call.mask = address(mask, np.uint8)
            call.mask_row_stride, call.mask_batch_stride = mask.shape[2], mask.shape[1] * mask.shape[2]
        if cache is not None:
            cached, cached_lengths = cache
            self._set_prefix(call, cached, 0, hqk, cached_lengths)
            call.prefix_activated, call.own_bucket_column = 1, cached.shape[1]
        self._run(call)

    def queries(
        self,
        uq: Array,
        kv: Array,
        buckets: Array | None,
        positions: Array,
        *,
        out: Array,
        out_scales: Array | None = None,
        cache: tuple[Array, Array] | None = None,
        starts: Array | None = None,
        threaded: bool = True,
    ) -> None:
        """`out` holds the gated output of rows uq [B, Q, W/2] at positions int64 [B, Q] of a history.

        Row i sees the rows of kv [B, L, W/2] up to its own position; one at -1 sees nothing and becomes zero.
        Columns: u, q and k, v, all before SiLU. buckets [B, Q, L]. With `cache`, as in `attention`, kv extends a
        history: the cached rows are seen too, positions count from the first of kv, and buckets are [B, Q, P + L].
        """
        hv, hqk = self._hv, self._hqk
        call = self._call(uq, (0, 0, hv, 0), hv + hqk, out, out_scales, buckets, threaded)
        call.mode = QUERIES
        seen = positions.max(axis=1, initial=-1) + 1
        if cache is None:
            self._set_prefix(call, kv, 0, hqk, seen, starts)
        else:
            cached, cached_lengths = cache
            self._set_prefix(call, cached, 0, hqk, cached_lengths)
            call.prefix_activated, call.own_bucket_column = 1, cached.shape[1]
            size, (_, count, width) = kv.itemsize, kv.shape
            data, first = address(kv, uq.dtype), None if starts is None else _starts(starts, len(seen), kv)
            call.k = data, width, count * width, first
            call.v = data + hqk * size, width, count * width, first
            call.own_lengths = address(seen, np.int64)
            positions = np.where(positions < 0, positions, positions + cached_lengths[:, None])
        self._set_positions(call, positions)
        self._run(call)

    def candidates(
        self,
        history: Array,
        uvqk: Array,
        buckets: Array | None,
        positions: Array,
        *,
        out: Array,
        v_offset: int,
        k_offset: int,
        own_buckets: Array | None = None,
        out_scales: Array | None = None,
        starts: Array | None = None,
        threaded: bool = True,
    ) -> None:
        """`out` holds the gated output of candidates uvqk [B, C, W] that see history and themselves.

        history [B, L, ·] before SiLU holds v from column v_offset on, and k from k_offset on. positions int64
        [B, C or 1]: how many events each candidate sees. buckets [B, C or 1, L]; own_buckets [B, C or 1] of the same
        type, bucket 0 where they are not given.
        """
        hv, hqk = self._hv, self._hqk
        call = self._call(uvqk, (0, hv, 2 * hv, 2 * hv + hqk), 2 * (hv + hqk), out, out_scales, buckets, threaded)
        call.mode = CANDIDATES
        seen = positions.max(axis=1, initial=0)
        self._set_prefix(call, history, k_offset, v_offset, seen, starts)
        self._set_positions(call, positions)
        if own_buckets is not None:
            call.own_buckets = address(own_buckets, own_buckets.dtype)
            call.own_bucket_row_stride = int(own_buckets.shape[1] > 1)
            call.own_bucket_batch_stride = own_buckets.shape[1]
        self._run(call)

    def _call(
        self, rows: Array, columns: tuple[int, int, int, int], width: int, out: Array, out_scales: Array | None,
        buckets: Array | None, threaded: bool,
    ) -> Call:  # fmt: skip
        """What all calls have in common; `columns` is where u, v, q and k start in `rows`."""
        batch, queries, columns_given = rows.shape
        if columns_given != width or out.shape != (batch, queries, self._hv):
            raise KernelError(f"{rows.shape} does not fit {self.shape.heads} heads and out {out.shape}")
        call = Call.from_buffer_copy(self._template)
        call.batch, call.queries, call.threaded = batch, queries, threaded
        data, size = address(rows, rows.dtype), rows.itemsize
        call.u, call.v, call.q, call.k = (
            (data + column * size, width, queries * width) for column in columns
        )  # fmt: skip
        call.in_type = float_type(rows)
        call.out = address(out, out.dtype)
        call.out_type = INT8 if out.dtype == np.int8 else float_type(out)
        if out_scales is not None:
            call.out_scales = address(out_scales, np.float32)
        if (out_scales is not None) != (out.dtype == np.int8):
            raise KernelError("out_scales belong to an int8 output, and to no other")
        if buckets is not None:
            if buckets.dtype not in _BUCKET_BYTES:
                raise KernelError(f"expected buckets of uint8, int32 or int64, got {buckets.dtype}")
            _, bucket_rows, keys = buckets.shape
            call.buckets, call.bucket_type = address(buckets, buckets.dtype), buckets.itemsize
            call.bucket_row_stride, call.bucket_batch_stride = (keys if bucket_rows > 1 else 0), bucket_rows * keys
        return call

    @staticmethod
    def _set_prefix(
        call: Call, rows: Array, k_column: int, v_column: int, lengths: Array, starts: Array | None = None
    ) -> None:
        size, (_, count, width) = rows.itemsize, rows.shape
        data = address(rows[:1], rows.dtype)  # of each user; users may stand apart, as one layer's rows of a cache do
        first = None if starts is None else _starts(starts, len(lengths), rows)
        call.prefix_rows, call.prefix_type = count, float_type(rows)
        call.prefix_k = data + k_column * size, width, rows.strides[0] // size, first
        call.prefix_v = data + v_column * size, width, rows.strides[0] // size, first
        call.prefix_lengths = address(lengths, np.int64)

    @staticmethod
    def _set_positions(call: Call, positions: Array) -> None:
        call.positions = address(positions, np.int64)
        call.position_row_stride, call.position_batch_stride = int(positions.shape[1] > 1), positions.shape[1]

    def _run(self, call: Call) -> None:
        error = self._function(ctypes.byref(call))
        if error:
            raise KernelError(f"the attention kernel refuses the call: {error.decode()}")


def _starts(starts: Array, batch: int, rows: Array) -> int:
    """Where the starts stand; KernelError when they are not those of `batch` users in jagged rows [1, T, ·]."""
    if starts.shape != (batch + 1,) or rows.shape[0] != 1 or not 0 <= starts[-1] <= rows.shape[1]:
        raise KernelError(f"{starts.tolist()} are no starts of {batch} users in rows of shape {rows.shape}")
    return address(starts, np.int64)


def time_buckets(
    library: Library, start: Array, end: Array, edges: Array, *, causal: bool, threaded: bool = True
) -> Array:
    """uint8 [B, Q, T]: bucket of |start[b, i] - end[b, t]|, int64 [B, Q] and [B, T]; with causal 0 for t > i.

    edges int64 [130]: 0, the smallest difference of each bucket, and the largest int64.
    """
    out = np.empty((*start.shape, end.shape[1]), dtype=np.uint8)
    batch, rows = start.shape
    library.functions.hstu_time_buckets(
        address(start, np.int64), address(end, np.int64), batch, rows, end.shape[1], causal,
        address(edges, np.int64), address(out, np.uint8), threaded,
    )  # fmt: skip
    return out
