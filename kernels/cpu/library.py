"""The CPU kernels as one shared library: `build` compiles it, `Library` opens it.

The library is prebuilt into an engine's folder and needs no compiler where it is used: only the libtbb of the
openvino wheel, whose threads it shares. It chooses AVX2, AVX-512 or AVX-512 with bf16 and VNNI when it is loaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kernels.cpu import compiler as cpp
from kernels.cpu.cache import digest, files_of
from kernels.cpu.compiler import compiler_version as compiler_version
from kernels.errors import KernelError as KernelError

Array = npt.NDArray[Any]
Isa = Literal["avx2", "avx512", "avx512_bf16"]
LIBRARY = "libhstu_cpu.so"
OPERATIONS = "libhstu_openvino.so"  # OpenVINO operations around the kernels, for the very version they are built with
VERSION = 3
FLOAT32, BFLOAT16, INT8 = 0, 1, 2  # hstu::Type of runtime.h

_FOLDERS = ("cpu", "hstu_attention", "item_head", "projection")
_UNITS: dict[str, tuple[str, ...]] = {  # translation unit → the instructions it may use
    "avx2": cpp.AVX2,
    "avx512": cpp.AVX512,
    "avx512_bf16": (*cpp.AVX512, "-mavx512bf16", "-mavx512vnni"),
    "dispatch": (),
    "openvino_ops": (),
}


def openvino_folder() -> Path:
    """The folder of the installed openvino wheel, without importing it; KernelError when there is none."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or not spec.submodule_search_locations:
        raise KernelError("the package openvino is not installed: the CPU kernels share its thread library")
    return Path(next(iter(spec.submodule_search_locations)))


def build(folder: Path, *, compiler: str = "g++", cache: Path | None = None) -> Path:
    """`folder` holds libhstu_cpu.so, whose path is returned, and libhstu_openvino.so.

    The same compiler makes the same bytes; with `cache` (`kernels.cpu.cache`) it makes them once. Raises KernelError
    with its own words when it is missing or refuses.
    """
    sources = cpp.sources_of(*_FOLDERS)
    if cache is None:
        files = _compile(sources, compiler)
    else:
        openvino_folder()  # says what is missing
        made_by = {
            "compiler": cpp.run([compiler, "--version"], Path.cwd()),
            "openvino": metadata.version("openvino"),
            "commands": repr((cpp.FLAGS, _UNITS)),
        }
        key = digest({**sources, **{name: value.encode() for name, value in made_by.items()}})
        files = files_of(cache, key, lambda: _compile(sources, compiler))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / LIBRARY


def _compile(sources: Mapping[str, bytes], compiler: str) -> Mapping[str, bytes]:
    """Both libraries by name."""
    openvino = openvino_folder()
    headers = ("-isystem", str(openvino / "include"), f"-ffile-prefix-map={openvino}=openvino")
    units = {unit: flags or headers for unit, flags in _UNITS.items()}
    with cpp.objects(sources, units, "cpu", compiler) as work:
        openvino_library = next((openvino / "libs").glob("libopenvino.so.*")).name
        for library, parts, needed in (
            (LIBRARY, [unit for unit in _UNITS if unit != "openvino_ops"], "libtbb.so.12"),
            (OPERATIONS, ["openvino_ops"], openvino_library),
        ):
            link = ["-L", str(openvino / "libs"), f"-l:{needed}", *cpp.LINK]
            cpp.run([compiler, "-shared", "-o", library, *(f"{unit}.o" for unit in parts), *link], work)
        return {library: (work / library).read_bytes() for library in (LIBRARY, OPERATIONS)}


class Library(cpp.Isa):
    """The kernels in this process; `functions` are the C functions, which release Python's lock."""

    def __init__(self, path: Path, call_bytes: int) -> None:
        try:
            self._tbb = ctypes.CDLL(str(openvino_folder() / "libs" / "libtbb.so.12"))
            self.functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path}: the CPU kernels cannot be loaded ({error})") from None
        self.functions.hstu_cpu_call_bytes.restype = ctypes.c_int64
        self.functions.hstu_attention.restype = ctypes.c_char_p
        self.functions.hstu_item_head_bytes.restype = ctypes.c_int64
        self.functions.hstu_projection_bytes.restype = ctypes.c_int64
        self.functions.hstu_projection.restype = ctypes.c_char_p
        pointer, integer, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self.functions.hstu_time_buckets.argtypes = (
            pointer, pointer, integer, integer, integer, flag, pointer, pointer, flag,
        )  # fmt: skip
        found = (self.functions.hstu_cpu_version(), self.functions.hstu_cpu_call_bytes())
        if found != (VERSION, call_bytes):
            raise KernelError(
                f"{path}: CPU kernels of another version {found}, this code wants {(VERSION, call_bytes)}"
            )
        super().__init__(self.functions, "hstu_cpu", "the CPU kernels")


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
