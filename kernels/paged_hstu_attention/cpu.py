"""HSTU attention on paged keys and values as a small shared library: `build` compiles it, `PagedLibrary` opens it.

It needs no compiler and no other library where it is used: its threads are those of the OpenMP that torch brings.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels.cpu.library import KernelError

LIBRARY = "libhstu_paged.so"

_KERNELS = Path(__file__).parents[1]
_UNITS: dict[str, tuple[str, ...]] = {  # translation unit → the instructions it may use
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "cpu": (),
}
_FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-DNDEBUG", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-ident", "-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-I", ".",
)  # fmt: skip


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


def build(folder: Path, *, compiler: str = "g++") -> Path:
    """`folder` holds libhstu_paged.so, whose path is returned; the same compiler makes the same bytes.

    Raises KernelError with the compiler's own words when it is missing or refuses.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for part in ("cpu", "hstu_attention", "paged_hstu_attention"):
            (work / part).mkdir()
            for source in sorted((_KERNELS / part).iterdir()):
                if source.suffix in (".h", ".cpp"):
                    shutil.copyfile(source, work / part / source.name)
        units = [
            [compiler, *_FLAGS, *flags, "-c", f"paged_hstu_attention/{unit}.cpp", "-o", f"{unit}.o"]
            for unit, flags in _UNITS.items()
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda command: _run(command, work), units))
        objects = [f"{unit}.o" for unit in _UNITS]
        _run([compiler, "-shared", "-o", LIBRARY, *objects, "-static-libstdc++", "-static-libgcc",
              "-Wl,--build-id=none", "-Wl,-O1", "-s"], work)  # fmt: skip
        shutil.copyfile(work / LIBRARY, folder / LIBRARY)
    return folder / LIBRARY


def _run(command: list[str], cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KernelError(f"there is no {command[0]} here: install a C++20 compiler (g++ 12 or newer)") from None
    if done.returncode:
        raise KernelError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


class PagedLibrary:
    """The kernel in this process. Calls are the caller's to fill; `attention` and `buckets` release Python's lock."""

    def __init__(self, path: Path) -> None:
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path}: the paged attention kernel cannot be loaded ({error})") from None
        self._functions.hstu_paged_call_bytes.restype = ctypes.c_int64
        self._functions.hstu_paged_isa.restype = ctypes.c_char_p
        found, wanted = self._functions.hstu_paged_call_bytes(), ctypes.sizeof(PagedCall)
        if found != wanted:
            raise KernelError(f"{path}: a kernel of another version (calls of {found} bytes, not {wanted})")
        if not self.isa:
            raise KernelError("this CPU lacks AVX2 and FMA, which the paged attention kernel needs")
        self.attention = self._functions.hstu_paged_attention
        self.buckets = self._functions.hstu_paged_buckets
        for function in (self.attention, self.buckets):
            function.argtypes, function.restype = [ctypes.POINTER(PagedCall)], None

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._functions.hstu_paged_isa().decode()  # type: ignore[no-any-return]

    def limit_isa(self, isa: str) -> None:
        """From now on, in the whole process, at most `isa` is used; KernelError when this CPU lacks it."""
        if not self._functions.hstu_paged_limit_isa(isa.encode()):
            raise KernelError(f"this CPU has no {isa} (it has {self.isa})")


def openmp_region(library: Path) -> int:
    """The address of GOMP_parallel in an OpenMP library, so that the kernel runs on the threads of its pool."""
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError) as error:
        raise KernelError(f"{library}: no OpenMP that the paged attention kernel can share ({error})") from None
