"""The CPU kernels as one shared library: `build` compiles it, `Library` opens it.

The library is prebuilt into an engine's folder and needs no compiler where it is used: only the libtbb of the
openvino wheel, whose threads it shares. It chooses AVX2, AVX-512 or AVX-512 with bf16 and VNNI when it is loaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kernels.cpu.cache import digest, files_of
from kernels.errors import KernelError as KernelError

Array = npt.NDArray[Any]
Isa = Literal["avx2", "avx512", "avx512_bf16"]
LIBRARY = "libhstu_cpu.so"
OPERATIONS = "libhstu_openvino.so"  # OpenVINO operations around the kernels, for the very version they are built with
VERSION = 2
FLOAT32, BFLOAT16, INT8 = 0, 1, 2  # hstu::Type of runtime.h

_KERNELS = Path(__file__).parents[1]
_FOLDERS = ("cpu", "hstu_attention", "item_head")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
_UNITS: dict[str, tuple[str, ...]] = {  # translation unit → the instructions it may use
    "avx2": ("-mavx2", "-mfma"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
    "dispatch": (),
    "openvino_ops": (),
}
# Contraction is spelled out in the sources, so that every row is computed alike. GCC 12 warns of its own headers.
_FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-DNDEBUG", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-ident", "-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-I", ".",
)  # fmt: skip


def openvino_folder() -> Path:
    """The folder of the installed openvino wheel, without importing it; KernelError when there is none."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or not spec.submodule_search_locations:
        raise KernelError("the package openvino is not installed: the CPU kernels share its thread library")
    return Path(next(iter(spec.submodule_search_locations)))


def compiler_version(compiler: str = "g++") -> str:
    """The first line of `g++ --version`; KernelError when there is no such compiler."""
    return _run([compiler, "--version"], Path.cwd()).splitlines()[0]


def build(folder: Path, *, compiler: str = "g++", cache: Path | None = None) -> Path:
    """`folder` holds libhstu_cpu.so, whose path is returned, and libhstu_openvino.so.

    The same compiler makes the same bytes; with `cache` (`kernels.cpu.cache`) it makes them once. Raises KernelError
    with its own words when it is missing or refuses.
    """
    sources = {
        f"{part}/{path.name}": path.read_bytes()
        for part in _FOLDERS
        for path in sorted((_KERNELS / part).iterdir())
        if path.suffix in (".h", ".cpp")
    }
    if cache is None:
        files = _compile(sources, compiler)
    else:
        openvino_folder()  # says what is missing
        made_by = {
            "compiler": _run([compiler, "--version"], Path.cwd()),
            "openvino": metadata.version("openvino"),
            "commands": repr((_FLAGS, _UNITS)),
        }
        key = digest({**sources, **{name: value.encode() for name, value in made_by.items()}})
        files = files_of(cache, key, lambda: _compile(sources, compiler))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / LIBRARY


def _compile(sources: Mapping[str, bytes], compiler: str) -> Mapping[str, bytes]:
    """Both libraries by name."""
    openvino = openvino_folder()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, content in sources.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes(content)
        headers = ("-isystem", str(openvino / "include"), f"-ffile-prefix-map={openvino}=openvino")
        units = [
            [compiler, *_FLAGS, *flags, *(() if flags else headers), "-c", f"cpu/{unit}.cpp", "-o", f"{unit}.o"]
            for unit, flags in _UNITS.items()
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda command: _run(command, work), units))
        openvino_library = next((openvino / "libs").glob("libopenvino.so.*")).name
        for library, parts, needed in (
            (LIBRARY, [unit for unit in _UNITS if unit != "openvino_ops"], "libtbb.so.12"),
            (OPERATIONS, ["openvino_ops"], openvino_library),
        ):
            link = ["-L", str(openvino / "libs"), f"-l:{needed}", "-Wl,--build-id=none", "-Wl,-O1", "-s"]
            _run([compiler, "-shared", "-o", library, *(f"{unit}.o" for unit in parts), *link], work)
        return {library: (work / library).read_bytes() for library in (LIBRARY, OPERATIONS)}


def _run(command: Sequence[str], cwd: Path) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KernelError(f"there is no {command[0]} here: install a C++20 compiler (g++ 12 or newer)") from None
    if done.returncode:
        raise KernelError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


class Library:
    """The kernels in this process; `functions` are the C functions, which release Python's lock."""

    def __init__(self, path: Path, call_bytes: int) -> None:
        try:
            self._tbb = ctypes.CDLL(str(openvino_folder() / "libs" / "libtbb.so.12"))
            self.functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path}: the CPU kernels cannot be loaded ({error})") from None
        self.functions.hstu_cpu_isa.restype = ctypes.c_char_p
        self.functions.hstu_cpu_call_bytes.restype = ctypes.c_int64
        self.functions.hstu_attention.restype = ctypes.c_char_p
        self.functions.hstu_item_head_bytes.restype = ctypes.c_int64
        pointer, integer, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self.functions.hstu_time_buckets.argtypes = (
            pointer, pointer, integer, integer, integer, flag, pointer, pointer, flag,
        )  # fmt: skip
        found = (self.functions.hstu_cpu_version(), self.functions.hstu_cpu_call_bytes())
        if found != (VERSION, call_bytes):
            raise KernelError(
                f"{path}: CPU kernels of another version {found}, this code wants {(VERSION, call_bytes)}"
            )
        if not self.isa:
            raise KernelError("this CPU lacks AVX2 and FMA, which the CPU kernels need")

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self.functions.hstu_cpu_isa().decode()  # type: ignore[no-any-return]

    def limit_isa(self, isa: Isa) -> None:
        """From now on, in the whole process, at most `isa` is used; KernelError when this CPU lacks it."""
        if not self.functions.hstu_cpu_limit_isa(isa.encode()):
            raise KernelError(f"this CPU has no {isa} (it has {self.isa})")


def address(array: Array, dtype: type[np.generic] | np.dtype[Any]) -> int:
    """Where the array's elements stand; KernelError when they are of another type or not contiguous."""
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise KernelError(f"expected a contiguous array of {np.dtype(dtype)}, got {array.dtype}")
    return array.__array_interface__["data"][0]  # type: ignore[no-any-return]


def float_type(array: Array) -> int:
    """FLOAT32, or BFLOAT16 for uint16; KernelError for anything else."""
    if array.dtype == np.float32:
        return FLOAT32
    if array.dtype == np.uint16:
        return BFLOAT16
    raise KernelError(f"expected float32, or uint16 holding bf16, got {array.dtype}")
