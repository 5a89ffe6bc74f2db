"""Triton kernels compiled ahead of time: cubin, PTX and a description, the same bytes from run to run.

No GPU is needed. Each kernel is compiled in a process of its own kind (`compile_all`), because Triton reads its
environment when it is imported. What a compiled kernel must show is checked here: no spills, shared memory within the
SM's limit, warpgroup products where there is a product, tanh.approx where SiLU is.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kernels.errors import KernelError
from kernels.spec import SHARED_LIMIT, Config, Kernel

_ROOT = Path(__file__).parent
SCHEMA = 1
# How PTX numbers element types → CUtensorMapDataType (PTX ISA `tensormap.replace`; CUDA Driver API).
_TENSOR_MAP_KINDS = {**{kind: kind for kind in range(8)}, 8: 10, 9: 8, 10: 9}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in one config for one SM; `faults` says why it must not ship, empty when it may."""

    description: Mapping[str, Any]
    cubin: bytes
    ptx: str
    faults: tuple[str, ...]


def check_environment() -> None:
    """KernelError where Triton would interpret kernels instead of compiling them."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise KernelError("TRITON_INTERPRET is set: kernels would be interpreted", fix="unset TRITON_INTERPRET")


def compile_all(work: Sequence[tuple[Kernel, Config, int]], *, processes: int) -> Iterator[Compiled]:
    """Each (kernel, config, sm) compiled, in order. The processes have a cache folder that is deleted afterwards."""
    check_environment()
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            processes, mp_context=get_context("spawn"), initializer=_set_environment, initargs=(cache,)
        ) as pool,
    ):
        yield from pool.map(_compile, *zip(*work, strict=True)) if work else ()


def _set_environment(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # paths and line numbers would be in the bytes


def source_files(op: str) -> list[Path]:
    """The files that define an op's kernels."""
    shared = [_ROOT / "silu.py", _ROOT / "hstu_attention" / "triton.py"] if "hstu" in op else [_ROOT / "silu.py"]
    return sorted({*shared, _ROOT / op / "triton.py"})


def source_hash(op: str) -> str:
    """SHA-256 of the sources of an op's kernels."""
    digest = hashlib.sha256()
    for path in source_files(op):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _compile(kernel: Kernel, config: Config, sm: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"kernels.{kernel.op}.triton"), kernel.function)
    constants = {**kernel.constants, **config.constants}
    types = {argument.name: argument.type.format(**constants) for argument in kernel.arguments}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    unknown = [name for name in function.arg_names if name not in types and name not in constants]
    order = [name for name in function.arg_names if name in types]
    if unknown or order != list(types):
        raise KernelError(f"{kernel.name}: arguments differ from the source", got=[*types], expected=order + unknown)
    places = {name: place for place, name in enumerate(function.arg_names)}
    attributes = {(places[a.name],): [["tt.divisibility", 16]] for a in kernel.arguments if a.aligned}
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    cubin, ptx, metadata = compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    resources = inspect(cubin, tools)
    description = {
        "schema": SCHEMA,
        "kernel": kernel.name,
        "op": kernel.op,
        "sm": sm,
        "entry": metadata.name,
        "arguments": [asdict(a) | {"type": types[a.name]} for a in kernel.arguments],
        "tensor_maps": [
            {
                "kind": _TENSOR_MAP_KINDS[m["elem_type"]],
                "item_bytes": m["elem_size"],
                "box": list(m["block_size"]),
                "swizzle": m["swizzle"],
            }
            for m in getattr(metadata, "tensordesc_meta", None) or ()
        ],
        "constants": constants,
        "config": config.label(),
        "grid": list(kernel.grid),
        "threads": config.num_warps * 32,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "shared_bytes": metadata.shared,
        "scratch_bytes": {"global": metadata.global_scratch_size, "profile": metadata.profile_scratch_size},
        **resources,
        "ptx_target": _first(r"^\.target (\S+)", ptx),
        "ptx_version": _first(r"^\.version (\S+)", ptx),
        "ranges": {size: list(limits) for size, limits in kernel.ranges.items()},
        "tolerance": kernel.tolerance,
        "tools": {"triton": triton.__version__, "ptxas": _ptxas_version(tools, sm)},
        "source_sha256": source_hash(kernel.op),
    }
    return Compiled(description, cubin, ptx, tuple(_faults(kernel, description)))


def inspect(cubin: bytes, tools: Path) -> dict[str, Any]:
    """Registers, stack and local memory of a cubin's one kernel, and the instructions that tell how it works."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool(tools / "cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool(tools / "cuobjdump", "--dump-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    count = {name: len(re.findall(rf"\b{name}\b", assembly)) for name in ("LDL", "STL", "HGMMA", "IGMMA", "HMMA")}
    return {
        "registers": numbers["REG"],
        "stack_bytes": numbers["STACK"],
        "local_bytes": numbers["LOCAL"],
        "spills": count["LDL"] + count["STL"],
        "instructions": {
            "warpgroup_products": count["HGMMA"] + count["IGMMA"] + len(re.findall(r"\bUT?C?[HIO]*MMA\b", assembly)),
            "warp_products": count["HMMA"] + len(re.findall(r"\bIMMA\b", assembly)),
            "tanh": len(re.findall(r"\bMUFU\.TANH\b", assembly)),
        },
    }


def _faults(kernel: Kernel, description: Mapping[str, Any]) -> Iterator[str]:
    sm, found = description["sm"], description["instructions"]
    if description["spills"] or description["local_bytes"] or description["stack_bytes"]:
        yield f"{description['spills']} spills, {description['stack_bytes']} bytes of stack"
    limit = min(SHARED_LIMIT[sm], kernel.shared_limit or SHARED_LIMIT[sm])
    if description["shared_bytes"] > limit:
        yield f"{description['shared_bytes']} bytes of shared memory, over {limit}"
    if kernel.matrix and sm >= 90 and not found["warpgroup_products"]:
        yield "no warpgroup product"
    if kernel.matrix and sm < 90 and not found["warp_products"]:
        yield "no product on tensor cores"
    if kernel.tanh and not found["tanh"]:
        yield "no tanh.approx"
    if any(description["scratch_bytes"].values()):
        yield f"wants scratch memory: {description['scratch_bytes']}"


def _tool(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"{Path(command[0]).name} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _ptxas_version(tools: Path, sm: int) -> str:
    return _first(r"(V[\d.]+)", _tool(tools / ("ptxas-blackwell" if sm >= 100 else "ptxas"), "--version"))


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise KernelError(f"{pattern} is not in the compiler's output")
    return found[1]
