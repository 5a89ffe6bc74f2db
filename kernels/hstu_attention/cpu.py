"""The fused CPU kernel: `build` compiles it, `load` opens it, and numpy arrays go in and out.

The library is prebuilt into an engine's folder and needs no compiler where it is used: only the libtbb of the
openvino wheel, whose threads it shares. It chooses AVX2, AVX-512 or AVX-512 with bf16 when it is loaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Isa = Literal["avx2", "avx512", "avx512_bf16"]
LIBRARY = "libhstu_attention.so"
SOURCES = Path(__file__).parent / "cpu"
VERSION = 1

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
_UNITS: dict[str, tuple[str, ...]] = {  # translation unit → the instructions it may use
    "avx2": ("-mavx2", "-mfma"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "dispatch": (),
}
# Contraction is spelled out in the sources, so that every row is computed alike. GCC 12 warns of its own headers.
_FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-DNDEBUG", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-ident",     "-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
)  # fmt: skip


class KernelError(RuntimeError):
    """The kernel cannot be compiled or loaded here, or a call makes no sense."""


def openvino_folder() -> Path:
    """The folder of the installed openvino wheel, without importing it; KernelError when there is none."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or not spec.submodule_search_locations:
        raise KernelError("the package openvino is not installed: the CPU kernel shares its thread library")
    return Path(next(iter(spec.submodule_search_locations)))


def compiler_version(compiler: str = "g++") -> str:
    """The first line of `g++ --version`; KernelError when there is no such compiler."""
    return _run([compiler, "--version"], Path.cwd()).splitlines()[0]


def build(folder: Path, *, compiler: str = "g++") -> Path:
    """`folder/libhstu_attention.so` stands, the same bytes whenever the same compiler makes it; its path.

    Raises KernelError with the compiler's own words when it is missing or refuses.
    """
    openvino = openvino_folder()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for source in sorted(SOURCES.iterdir()):
            shutil.copyfile(source, work / source.name)
        include = ("-isystem", str(openvino / "include"), f"-ffile-prefix-map={openvino}=openvino")
        compile_unit = [
            [
                compiler,
                *_FLAGS,
                *flags,
                *(include if unit == "dispatch" else ()),
                "-c",
                f"{unit}.cpp",
                "-o",
                f"{unit}.o",
            ]
            for unit, flags in _UNITS.items()
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda command: _run(command, work), compile_unit))
        link = ["-L", str(openvino / "libs"), "-l:libtbb.so.12", "-Wl,--build-id=none", "-Wl,-O1", "-s"]
        _run([compiler, "-shared", "-o", LIBRARY, *(f"{unit}.o" for unit in _UNITS), *link], work)
        shutil.copyfile(work / LIBRARY, folder / LIBRARY)
    return folder / LIBRARY


def _run(command: Sequence[str], cwd: Path) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KernelError(f"there is no {command[0]} here: install a C++20 compiler (g++ 12 or newer)") from None
    if done.returncode:
        raise KernelError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("batch_stride", ctypes.c_int64))


class _Call(ctypes.Structure):
    """`hstu::Call` of cpu/abi.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "queries", "heads", "qk_dim", "v_dim", "max_length")),
        ("prefix_rows", ctypes.c_int64),
        *((name, _Rows) for name in ("u", "v", "q", "k", "prefix_v", "prefix_k")),
        *((name, ctypes.c_void_p) for name in ("lengths", "prefix_lengths", "positions")),
        *((name, ctypes.c_int64) for name in ("position_row_stride", "position_batch_stride")),
        *((name, ctypes.c_void_p) for name in ("position_bias", "time_bias", "buckets")),
        *((name, ctypes.c_int64) for name in ("bucket_row_stride", "bucket_batch_stride", "own_bucket_column")),
        ("own_buckets", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("own_bucket_row_stride", "own_bucket_batch_stride")),
        ("mask", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mask_row_stride", "mask_batch_stride")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_row_stride", "out_batch_stride")),
        ("epsilon", ctypes.c_float),
        *(
            (name, ctypes.c_int32)
            for name in (
                "mode", "in_type", "out_type", "compute_type", "prefix_type", "prefix_activated", "bucket_type", "threaded",
            )
        ),
    )  # fmt: skip


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


class Library:
    """The kernel in this process. Floats are float32, or uint16 holding bf16; a call answers in its input's type."""

    def __init__(self, path: Path) -> None:
        try:
            self._tbb = ctypes.CDLL(str(openvino_folder() / "libs" / "libtbb.so.12"))
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path}: the CPU kernel cannot be loaded ({error})") from None
        self._library.hstu_attention.restype = ctypes.c_char_p
        self._library.hstu_attention_isa.restype = ctypes.c_char_p
        self._library.hstu_attention_call_bytes.restype = ctypes.c_int64
        version, size = self._library.hstu_attention_version(), self._library.hstu_attention_call_bytes()
        if (version, size) != (VERSION, ctypes.sizeof(_Call)):
            raise KernelError(f"{path}: a CPU kernel of another version ({version}, this code wants {VERSION})")
        if not self.isa:
            raise KernelError("this CPU lacks AVX2 and FMA, which the CPU kernel needs")

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._library.hstu_attention_isa().decode()  # type: ignore[no-any-return]

    def limit_isa(self, isa: Isa) -> None:
        """From now on, in the whole process, at most `isa` is used; KernelError when this CPU lacks it."""
        if not self._library.hstu_attention_limit_isa(isa.encode()):
            raise KernelError(f"this CPU has no {isa} (it has {self.isa})")

    def attention(
        self,
        shape: Shape,
        uvqk: Array,
        buckets: Array | None,
        lengths: Array | None,
        *,
        out: Array,
        cache: tuple[Array, Array] | None = None,
        mask: Array | None = None,
        threaded: bool = True,
    ) -> None:
        """`out` [B, Q, H·dv] holds the gated output of rows uvqk [B, Q, W] that see the rows up to themselves.

        lengths int64 [B]; rows after them become zero. buckets uint8, int32 or int64 [B, Q, Q]; mask uint8
        [B, Q, Q], zero forbids. With `cache` (k and v after SiLU [B, P, H·(dqk+dv)], lengths int64 [B]) the rows
        extend a history: they see the cached rows too, and buckets and mask are [B, Q, P + Q] and [B, Q, T],
        the latter over all keys in order of position.
        """
        hv, hqk = shape.heads * shape.v_dim, shape.heads * shape.qk_dim
        call = self._call(shape, uvqk, (0, hv, 2 * hv, 2 * hv + hqk), 2 * (hv + hqk), out, buckets, threaded)
        call.own_bucket_column = -1
        if lengths is not None:
            call.lengths = _pointer(lengths, np.int64)
        if mask is not None:
            call.mask = _pointer(mask, np.uint8)
            call.mask_row_stride, call.mask_batch_stride = mask.shape[2], mask.shape[1] * mask.shape[2]
        if cache is not None:
            rows, cached_lengths = cache
            _set_prefix(call, rows, 0, hqk, cached_lengths)
            call.prefix_activated, call.own_bucket_column = 1, rows.shape[1]
        self._run(call)

    def queries(
        self,
        shape: Shape,
        uq: Array,
        kv: Array,
        buckets: Array | None,
        positions: Array,
        *,
        out: Array,
        threaded: bool = True,
    ) -> None:
        """`out` [B, Q, H·dv] holds the gated output of rows uq [B, Q, W/2] at positions int64 [B, Q] of a history.

        Row i sees the rows of kv [B, L, W/2] up to its own position; one at -1 sees nothing and becomes zero.
        Columns: u, q and k, v, all before SiLU. buckets [B, Q, L].
        """
        hv, hqk = shape.heads * shape.v_dim, shape.heads * shape.qk_dim
        call = self._call(shape, uq, (0, 0, hv, 0), hv + hqk, out, buckets, threaded)
        call.mode = 2
        seen = np.ascontiguousarray(positions.max(axis=1, initial=-1) + 1)
        _set_prefix(call, kv, 0, hqk, seen)
        _set_positions(call, positions)
        self._run(call)

    def candidates(
        self,
        shape: Shape,
        history: Array,
        uvqk: Array,
        buckets: Array | None,
        positions: Array,
        *,
        out: Array,
        v_offset: int,
        k_offset: int,
        own_buckets: Array | None = None,
        threaded: bool = True,
    ) -> None:
        """`out` [B, C, H·dv] holds the gated output of candidates uvqk [B, C, W] that see history and themselves.

        history [B, L, ·] before SiLU holds v from column v_offset on, and k from k_offset on. positions int64
        [B, C or 1]: how many events each candidate sees. buckets [B, C or 1, L]; own_buckets [B, C or 1] of the same
        type, bucket 0 where they are not given.
        """
        hv, hqk = shape.heads * shape.v_dim, shape.heads * shape.qk_dim
        call = self._call(shape, uvqk, (0, hv, 2 * hv, 2 * hv + hqk), 2 * (hv + hqk), out, buckets, threaded)
        call.mode = 1
        seen = np.ascontiguousarray(positions.max(axis=1, initial=0))
        _set_prefix(call, history, k_offset, v_offset, seen)
        _set_positions(call, positions)
        if own_buckets is not None:
            call.own_buckets = own_buckets.ctypes.data
            call.own_bucket_row_stride = int(own_buckets.shape[1] > 1)
            call.own_bucket_batch_stride = own_buckets.shape[1]
        self._run(call)

    def time_buckets(
        self, start: Array, end: Array, thresholds: Array, *, causal: bool, threaded: bool = True
    ) -> Array:
        """uint8 [B, Q, T]: bucket of |start[b, i] - end[b, t]|, int64 [B, Q] and [B, T]; with causal 0 for t > i.

        thresholds int64 [130]: 0, the 128 edges, and the largest int64.
        """
        out = np.empty((*start.shape, end.shape[1]), dtype=np.uint8)
        self._library.hstu_time_buckets(
            ctypes.c_void_p(_pointer(start, np.int64)), ctypes.c_void_p(_pointer(end, np.int64)),
            ctypes.c_int64(start.shape[0]), ctypes.c_int64(start.shape[1]), ctypes.c_int64(end.shape[1]),
            ctypes.c_int32(causal), ctypes.c_void_p(_pointer(thresholds, np.int64)), ctypes.c_void_p(out.ctypes.data),
            ctypes.c_int32(threaded),
        )  # fmt: skip
        return out

    def _call(
        self, shape: Shape, rows: Array, columns: tuple[int, int, int, int], width: int, out: Array,
        buckets: Array | None, threaded: bool,
    ) -> _Call:  # fmt: skip
        """What all calls have in common; `columns` is where u, v, q and k start in `rows`."""
        if (
            rows.shape[2] != width
            or out.shape != (*rows.shape[:2], shape.heads * shape.v_dim)
            or out.dtype != rows.dtype
        ):
            raise KernelError(
                f"{rows.dtype} {rows.shape} does not fit {shape.heads} heads and out {out.dtype} {out.shape}"
            )
        if len(shape.position_bias) != 2 * shape.max_length - 1 or len(shape.time_bias) != 129:
            raise KernelError(f"bias tables of {len(shape.position_bias)} and {len(shape.time_bias)} values do not fit")
        u, v, q, k = (_rows(rows, column) for column in columns)
        call = _Call(
            batch=rows.shape[0], queries=rows.shape[1], heads=shape.heads, qk_dim=shape.qk_dim, v_dim=shape.v_dim,
            max_length=shape.max_length, u=u, v=v, q=q, k=k, own_bucket_column=-1,
            position_bias=_pointer(shape.position_bias, np.float32), time_bias=_pointer(shape.time_bias, np.float32),
            out=out.ctypes.data, out_row_stride=out.shape[2], out_batch_stride=out.shape[1] * out.shape[2],
            epsilon=shape.epsilon, in_type=_float_type(rows), out_type=_float_type(out), compute_type=int(shape.bf16), threaded=int(threaded),
        )  # fmt: skip
        if buckets is not None:
            call.buckets, call.bucket_type = _pointer(buckets, buckets.dtype), _bucket_type(buckets)
            call.bucket_row_stride = buckets.shape[2] if buckets.shape[1] > 1 else 0
            call.bucket_batch_stride = buckets.shape[1] * buckets.shape[2]
        return call

    def _run(self, call: _Call) -> None:
        error = self._library.hstu_attention(ctypes.byref(call))
        if error:
            raise KernelError(f"the attention kernel refuses the call: {error.decode()}")


def load(path: Path) -> Library:
    """The library `build` made, ready to be called; KernelError when it does not fit this machine or this code."""
    return Library(path)


def _pointer(array: Array, dtype: npt.DTypeLike) -> int:
    if array.dtype != np.dtype(dtype) or not array.flags.c_contiguous:
        raise KernelError(f"expected a contiguous array of {np.dtype(dtype)}, got {array.dtype}")
    return array.ctypes.data


def _rows(array: Array, column: int = 0) -> _Rows:
    size = array.itemsize
    if array.ndim != 3 or array.strides[2] != size:
        raise KernelError(f"expected rows [batch, rows, columns] with contiguous columns, got {array.shape}")
    return _Rows(array.ctypes.data + column * size, array.strides[1] // size, array.strides[0] // size)


def _set_prefix(call: _Call, rows: Array, k_column: int, v_column: int, lengths: Array) -> None:
    call.prefix_rows, call.prefix_type = rows.shape[1], _float_type(rows)
    call.prefix_k, call.prefix_v = _rows(rows, k_column), _rows(rows, v_column)
    call.prefix_lengths = _pointer(lengths, np.int64)


def _set_positions(call: _Call, positions: Array) -> None:
    call.positions = _pointer(positions, np.int64)
    call.position_row_stride, call.position_batch_stride = int(positions.shape[1] > 1), positions.shape[1]


def _float_type(array: Array) -> int:
    if array.dtype == np.float32:
        return 0
    if array.dtype == np.uint16:
        return 1
    raise KernelError(f"expected float32, or uint16 holding bf16, got {array.dtype}")


def _bucket_type(array: Array) -> int:
    if array.dtype not in (np.uint8, np.int32, np.int64):
        raise KernelError(f"expected buckets of uint8, int32 or int64, got {array.dtype}")
    return array.itemsize
