"""HSTU attention on paged keys and values as a small shared library: `build` compiles it, `PagedLibrary` opens it.

It needs no compiler and no other library where it is used: its threads are those of the OpenMP that torch brings.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels.cpu.cache import digest, files_of
from kernels.cpu.library import KernelError, compiler_version

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
_LINK = ("-static-libstdc++", "-static-libgcc", "-Wl,--build-id=none", "-Wl,-O1", "-s")


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
    sources = {
        f"{part}/{path.name}": path.read_bytes()
        for part in ("cpu", "hstu_attention", "paged_hstu_attention")
        for path in sorted((_KERNELS / part).iterdir())
        if path.suffix in (".h", ".cpp")
    }
    if cache is None:
        made = _compile(sources, compiler)
    else:
        made_by = {"compiler": compiler_version(compiler).encode(), "commands": repr((_FLAGS, _LINK, _UNITS)).encode()}
        made = files_of(cache, digest({**sources, **made_by}), lambda: _compile(sources, compiler))
    (folder / LIBRARY).write_bytes(made[LIBRARY])
    return folder / LIBRARY


def _compile(sources: Mapping[str, bytes], compiler: str) -> Mapping[str, bytes]:
    """The library by its name."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, content in sources.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes(content)
        units = [
            [compiler, *_FLAGS, *flags, "-c", f"paged_hstu_attention/{unit}.cpp", "-o", f"{unit}.o"]
            for unit, flags in _UNITS.items()
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda command: _run(command, work), units))
        _run([compiler, "-shared", "-o", LIBRARY, *(f"{unit}.o" for unit in _UNITS), *_LINK], work)
        return {LIBRARY: (work / LIBRARY).read_bytes()}


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
