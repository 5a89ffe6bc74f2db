"""CUTLASS kernels: compiled with nvcc into shared libraries, cached by content, launched through ctypes.

The libraries link neither libcudart nor libcuda: both come from the process that loads them (PyTorch brings its own).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kernels.errors import KernelError

_ROOT = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-O3", "-DNDEBUG", "-DCUTLASS_USE_TANH_FOR_SIGMOID", "--expt-relaxed-constexpr",
    "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", "-Xptxas", "-v",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """One library: the file below kernels/, what it is compiled with, and the function it offers."""

    file: str
    definitions: tuple[str, ...]
    function: str


UVQK = {
    "bf16": Source("uvqk_silu/cutlass.cu", ("UVQK_BF16",), "uvqk_silu_bf16"),
    "fp16": Source("uvqk_silu/cutlass.cu", (), "uvqk_silu_fp16"),
    "int8-bf16": Source("uvqk_silu/cutlass.cu", ("UVQK_BF16", "UVQK_INT8"), "uvqk_silu_int8_bf16"),
    "int8-fp16": Source("uvqk_silu/cutlass.cu", ("UVQK_INT8",), "uvqk_silu_int8_fp16"),
}


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled library and what ptxas said of it: registers of its kernel, bytes spilled, products serialised."""

    path: Path
    registers: int
    spilled_bytes: int
    serialised_products: int


def include_folder() -> Path:
    """CUTLASS's C++ headers; KernelError where the package that holds them is not installed."""
    given = os.environ.get("CUTLASS_INCLUDE")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        raise KernelError(
            "CUTLASS's headers are not here", expected="the package nvidia-cutlass, or CUTLASS_INCLUDE=FOLDER"
        )
    return Path(spec.origin).parent / "source" / "include"


def library_name(source: Source) -> str:
    """The file name of a library: what is in it decides."""
    digest = hashlib.sha256((_ROOT / source.file).read_bytes())
    digest.update(repr((FLAGS, source.definitions)).encode())
    return f"{source.function}-{digest.hexdigest()[:16]}.so"


def build(source: Source, folder: Path, *, nvcc: str = "nvcc") -> Built:
    """The library in `folder`, compiled unless the same source is there already; a minute and 2 GB of memory.

    Raises KernelError where nvcc is missing or refuses.
    """
    path = folder / library_name(source)
    log = path.with_suffix(".log")
    if not (path.is_file() and log.is_file()):
        if shutil.which(nvcc) is None:
            raise KernelError(f"there is no {nvcc} here", expected="CUDA 13.0's compiler", fix="install cuda-nvcc-13-0")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        command = [nvcc, *FLAGS, *(f"-D{name}" for name in source.definitions), "-I", str(include_folder())]
        command += ["-o", str(temporary), str(_ROOT / source.file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelError(f"nvcc refuses {source.file}:\n{(done.stderr + done.stdout)[-4000:]}")
        log.write_text(done.stderr + done.stdout, encoding="utf-8")
        temporary.rename(path)
    return read_log(path, log.read_text(encoding="utf-8"))


def read_log(path: Path, text: str) -> Built:
    """What ptxas said while `path` was compiled."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", text)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)]
    return Built(path, max(registers, default=0), sum(spills), text.count("C7510"))


class Projection:
    """uvqk_silu of one CUTLASS library."""

    def __init__(self, source: Source, path: Path) -> None:
        for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
                break
            except OSError:
                continue
        else:
            raise KernelError("there is no CUDA runtime in this process", fix="import torch (a CUDA build) first")
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path}: the library cannot be loaded ({error})") from None
        self._function = getattr(self._library, source.function)
        self._library.uvqk_silu_status.restype = ctypes.c_char_p

    def run(
        self, addresses: tuple[int, int, int, int, int, int], sizes: tuple[int, int, int],
        rows: tuple[int, int, int], device: int, num_sms: int, stream: int,
    ) -> None:  # fmt: skip
        """Queue out = SiLU(x Wᵀ + b): addresses of x, weight, bias, x_scale, weight_scale, out; sizes M, N, K; rows are
        elements from one row of x, weight and out to the next."""
        status = self._function(
            *(ctypes.c_void_p(a) for a in addresses), *(ctypes.c_int(n) for n in sizes),
            *(ctypes.c_int64(n) for n in rows), ctypes.c_int(device), ctypes.c_int(num_sms), ctypes.c_void_p(stream),
        )  # fmt: skip
        if status:
            text = self._library.uvqk_silu_status(ctypes.c_int(status)).decode()
            raise KernelError(f"CUTLASS refuses the projection: {text}", got=f"M, N, K = {sizes}, rows {rows}")
