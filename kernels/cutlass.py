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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import KernelError
from kernels.spec import Launch

_ROOT = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-O3", "-DNDEBUG", "-DCUTLASS_USE_TANH_FOR_SIGMOID", "--expt-relaxed-constexpr", "-shared",
    "-Xcompiler", "-fPIC", "-cudart", "none", "-Xptxas", "-v",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One library: its name, the file below kernels/ and the headers beside it, what it is compiled with and for, and
    the function it offers (whose name with `_status` explains what the function answers)."""

    name: str
    file: str
    function: str
    definitions: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("90a",)
    status: str = ""


def _uvqk(name: str, function: str, *definitions: str) -> Source:
    return Source(
        name=f"uvqk_silu-{name}", file="uvqk_silu/cutlass.cu", function=function, definitions=definitions,
        status="uvqk_silu_status",
    )  # fmt: skip


def _attention(dtype: str, head_dim: int, groups: int) -> Source:
    suffix = "" if groups == 2 else f"-g{groups}"
    return Source(
        name=f"hstu_attention-{dtype}-d{head_dim}{suffix}", file="hstu_attention/cutlass.cu", function="hstu_attention",
        definitions=(*(("HSTU_BF16",) if dtype == "bf16" else ()), f"HSTU_D={head_dim}", f"HSTU_GROUPS={groups}"),
        headers=("schedule.h",), status="hstu_attention_status",
    )  # fmt: skip


def _interaction(dtype: str) -> Source:
    return Source(
        name=f"interaction-{dtype}", file="interaction/cutlass.cu", function="interaction",
        definitions=("INTERACTION_BF16",) if dtype == "bf16" else (), headers=("samples.h",), targets=("80", "90a"),
        status="interaction_status",
    )  # fmt: skip


# groups: warpgroups that multiply 64 rows each, beside the one that loads.
SOURCES: Mapping[str, Source] = {
    source.name: source
    for source in (
        *(_attention(dtype, d, 2) for dtype in ("bf16", "fp16") for d in (64, 128)), _attention("bf16", 64, 3),
        *(_interaction(dtype) for dtype in ("bf16", "fp16")),
        _uvqk("bf16", "uvqk_silu_bf16", "UVQK_BF16"), _uvqk("fp16", "uvqk_silu_fp16"),
        _uvqk("int8-bf16", "uvqk_silu_int8_bf16", "UVQK_BF16", "UVQK_INT8"),
        _uvqk("int8-fp16", "uvqk_silu_int8_fp16", "UVQK_INT8"),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled library and what ptxas said of it: most registers of a kernel, bytes spilled, products serialised."""

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
    file = _ROOT / source.file
    digest = hashlib.sha256()
    for path in (file, *(file.parent / header for header in source.headers)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((FLAGS, source.definitions, source.targets)).encode())
    return f"{source.name}-{digest.hexdigest()[:16]}.so"


def build(source: Source, folder: Path, *, nvcc: str = "nvcc") -> Built:
    """The library in `folder`, compiled unless the same source is there already; up to a minute and 2 GB of memory.

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
        command += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in source.targets]
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


class Loaded:
    """The function of one CUTLASS library, in this process, for a GPU of an SM that it was compiled for."""

    def __init__(self, source: Source, folder: Path, sm: int) -> None:
        known = [int(target.rstrip("a")) for target in source.targets]
        if sm not in known:
            raise KernelError(
                f"{source.name}: no code for sm_{sm}", expected=" or ".join(f"sm_{one}" for one in known),
                fix="use the Triton kernel of build-kernels",
            )  # fmt: skip
        path = folder / library_name(source)
        if not path.is_file():
            raise KernelError(
                f"{folder}: there is no {path.name}",
                got=", ".join(sorted(p.name for p in folder.glob("*.so"))) or "no library at all",
                expected=f"{source.name}, built from the sources that are here",
                fix=f"python -m kernels.cutlass_build {folder} {source.name}",
            )
        _load_runtime()
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path}: the library cannot be loaded ({error})") from None
        self.source = source
        self._library = library
        self._function = getattr(library, source.function)
        self._status = getattr(library, source.status)
        self._status.restype = ctypes.c_char_p

    def shared_bytes(self) -> int | None:
        """Shared memory that a block asks for; None where the library does not say."""
        name = f"{self.source.function}_shared_bytes"
        return int(getattr(self._library, name)()) if hasattr(self._library, name) else None

    def call(self, *arguments: Any) -> None:
        """The function is called, with ctypes arguments in its own order; KernelError in CUDA's words when it fails."""
        status = self._function(*arguments)
        if status:
            raise KernelError(
                f"{self.source.name}: the launch failed: {self._status(ctypes.c_int(status)).decode()}",
                got=", ".join(str(argument.value) for argument in arguments),
            )


def _load_runtime() -> None:
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    raise KernelError("there is no CUDA runtime in this process", fix="import torch (a CUDA build) first")


_NUMBERS: Mapping[str, Any] = {"i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}


def _arguments(launch: Launch, aligned: Sequence[str], fields: str) -> list[Any]:
    """Values of a launch as ctypes, `fields` "name:kind .."; kind p is an address, i int, l int64, f float.

    Those `aligned` are multiples of 16 bytes: KernelError for another.
    """
    made: list[Any] = []
    for field in fields.split():
        name, _, kind = field.partition(":")
        value: Any = launch.values[name] if name in launch.values else launch.sizes[name]
        number = value.data_ptr() if kind == "p" else value
        step = 16 if kind == "p" else 8  # rows are counted in elements of two bytes
        if name in aligned and number % step:
            raise KernelError(
                f"{launch.kernel}: {name} is not a multiple of 16 bytes", got=number,
                fix="use views that begin and step in multiples of 16 bytes",
            )  # fmt: skip
        made.append(ctypes.c_void_p(number) if kind == "p" else _NUMBERS[kind](number))
    return made


def run_uvqk(library: Loaded, launch: Launch, device: int, num_sms: int, stream: int) -> None:
    """Queue out = SiLU(x Wᵀ + b) of a launch of `kernels.uvqk_silu.op`."""
    fields = "x:p weight:p bias:p x_scale:p weight_scale:p out:p num_rows:i num_columns:i depth:i x_row:l weight_row:l"
    arguments = _arguments(launch, ("x", "weight", "bias", "x_scale", "weight_scale", "out"), f"{fields} out_row:l")
    library.call(*arguments, ctypes.c_int(device), ctypes.c_int(num_sms), ctypes.c_void_p(stream))


def run_attention(library: Loaded, launch: Launch, num_sms: int, stream: int) -> None:
    """Queue the attention of a launch of `kernels.hstu_attention.op`, without bias and not gated."""
    if launch.kernel not in (library.source.name.removesuffix("-g3"), library.source.name.removesuffix("-g3") + "-tma"):
        raise KernelError(
            f"{library.source.name} is not a kernel for this call", got=launch.kernel,
            expected="its type and head size, without bias and not gated",
        )  # fmt: skip
    rows = launch.values["q"].shape[0]
    sized = Launch(launch.kernel, launch.values, {**launch.sizes, "rows": rows})
    fields = "q:p k:p v:p out:p offsets:p num_targets:p rows:i heads:i users:i longest:i q_row:l k_row:l v_row:l"
    aligned = ("q", "k", "v", "out", "q_row", "k_row", "v_row", "out_row")
    arguments = _arguments(sized, aligned, f"{fields} out_row:l scale:f")
    library.call(*arguments, ctypes.c_int(num_sms), ctypes.c_void_p(stream))


def run_interaction(library: Loaded, launch: Launch, num_sms: int, stream: int) -> None:
    """Queue the pairwise products of a launch of `kernels.interaction.op`: up to 32 features of width 128."""
    _, features, width = launch.values["x"].shape
    if features > 32 or width != 128 or not launch.kernel.startswith(library.source.name):
        raise KernelError(
            f"{library.source.name} is not a kernel for this call", got=launch.kernel,
            expected="its type, at most 32 features, of width 128",
        )  # fmt: skip
    sizes = {"features": features, "with_self": int(launch.kernel.endswith("-self"))}
    sized = Launch(launch.kernel, launch.values, {**launch.sizes, **sizes})
    arguments = _arguments(
        sized, ("x", "x_row"), "x:p out:p num_samples:l features:i x_row:l out_row:l with_self:i"
    )  # fmt: skip
    library.call(*arguments, ctypes.c_int(num_sms), ctypes.c_void_p(stream))
