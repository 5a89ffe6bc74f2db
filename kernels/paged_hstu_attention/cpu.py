"""HSTU attention on paged keys and values as a small shared library: `build` compiles it, `PagedLibrary` opens it.

It needs no compiler and no other library where it is used: its threads are those of the OpenMP that torch brings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

from kernels.cpu import compiler as cpp
from kernels.cpu.cache import digest, files_of
from kernels.errors import KernelError

LIBRARY = "libhstu_paged.so"

_FOLDERS = ("cpu", "hstu_attention", "paged_hstu_attention")
_UNITS: dict[str, tuple[str, ...]] = {"avx2": cpp.AVX2, "avx512": cpp.AVX512, "cpu": ()}
_LINK = ("-static-libstdc++", "-static-libgcc", *cpp.LINK)


class PagedCall(ctypes.Structure):
    """`hstu::PagedCall` of call.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "requests", "heads", "qk_dim", "v_dim", "max_length", "block")),
        ("uvqk", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("pages", "slots", "first", "num_new", "context", "table")),
        ("table_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("position_bias", "time_bias", "buckets", "bucket_start")),
        *((name, ctypes.c_void_p) for name in ("times", "next_times", "edges", "out")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("bfloat16", "gated", "num_suffix")),
        *((name, ctypes.c_void_p) for name in ("ancestors", "suffix")),
        ("threads", ctypes.c_int64),
        ("parallel", ctypes.c_void_p),
    )


def build(folder: Path, *, compiler: str = "g++", cache: Path | None = None) -> Path:
    """`folder` holds libhstu_paged.so, whose path is returned; the same compiler makes the same bytes.

    With `cache` (`kernels.cpu.cache`) it makes them once. Raises KernelError with its own words when it is missing or
    refuses.
    """
    sources = cpp.sources_of(*_FOLDERS)
    if cache is None:
        made = _compile(sources, compiler)
    else:
        commands = repr((cpp.FLAGS, _LINK, _UNITS))
        made_by = {"compiler": cpp.compiler_version(compiler).encode(), "commands": commands.encode()}
        made = files_of(cache, digest({**sources, **made_by}), lambda: _compile(sources, compiler))
    (folder / LIBRARY).write_bytes(made[LIBRARY])
    return folder / LIBRARY


def _compile(sources: Mapping[str, bytes], compiler: str) -> Mapping[str, bytes]:
    """The library by its name."""
    with cpp.objects(sources, _UNITS, "paged_hstu_attention", compiler) as work:
        cpp.run([compiler, "-shared", "-o", LIBRARY, *(f"{unit}.o" for unit in _UNITS), *_LINK], work)
        return {LIBRARY: (work / LIBRARY).read_bytes()}


class PagedLibrary(cpp.Isa):
    """The kernel in this process. Calls are the caller's to fill; `attention` and `buckets` release Python's lock."""

    def __init__(self, path: Path) -> None:
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path}: the paged attention kernel cannot be loaded ({error})") from None
        self._functions.hstu_paged_call_bytes.restype = ctypes.c_int64
        found, wanted = self._functions.hstu_paged_call_bytes(), ctypes.sizeof(PagedCall)
        if found != wanted:
            raise KernelError(f"{path}: a kernel of another version (calls of {found} bytes, not {wanted})")
        super().__init__(self._functions, "hstu_paged", "the paged attention kernels")
        self.attention = self._functions.hstu_paged_attention
        self.buckets = self._functions.hstu_paged_buckets
        for function in (self.attention, self.buckets):
            function.argtypes, function.restype = [ctypes.POINTER(PagedCall)], None


def openmp_region(library: Path) -> int:
    """The address of GOMP_parallel in an OpenMP library, so that the kernel runs on the threads of its pool."""
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError) as error:
        raise KernelError(f"{library}: no OpenMP that the paged attention kernel can share ({error})") from None
