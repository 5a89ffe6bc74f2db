"""TensorRT and TensorRT-RTX: a strongly typed ONNX file becomes a serialised engine.

One path serves TensorRT 10.x, TensorRT 11.x and TensorRT-RTX: every network is strongly typed, so
precision lives in the graph (casts, Q/DQ) and no precision flag or calibrator is ever passed. The two
products share this code and nothing else: an engine of one cannot be loaded by the other, and what was
built with TensorRT-RTX is never called TensorRT.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hstu.artifact import sha256_file
from hstu.config import HSTUConfig
from hstu.errors import CompilerError, GateError, MissingBackendError
from hstu.signature import EntryName, dynamic_ranges, entry
from stages import tensorrt_worker

WEIGHTS = "weights.bin"  # what an ONNX file may refer to, beside it
MAX_BUILDS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One of NVIDIA's two: `module` is its Python module, `suffix` that of the engines it makes."""

    name: str
    backend: str
    module: str
    suffix: str
    needs_gpu: bool  # to build
    install: str


TENSORRT = Product(
    name="TensorRT",
    backend="tensorrt",
    module="tensorrt",
    suffix=".plan",
    needs_gpu=True,
    install="pip install tensorrt (10.x or 11.x) on a machine with an NVIDIA GPU",
)
TENSORRT_RTX = Product(
    name="TensorRT-RTX",
    backend="tensorrt-rtx",
    module="tensorrt_rtx",
    suffix=".rtx",
    needs_gpu=False,
    install="pip install tensorrt-rtx",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings:
    """What a user may tune; the engine's numerics depend on `tf32` alone."""

    tf32: bool  # let fp32 matrix products round their operands to 10 bits of mantissa
    optimization_level: int  # 0..5: how long the builder searches
    workspace_mib: int  # device memory the engine may use besides its weights and bindings


# With these (and no address randomisation, see the worker) objects get the same addresses in every run.
_SAME_ADDRESSES = {
    "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}


class RejectedError(CompilerError):
    """The parser or the builder refused a model; `reasons` are NVIDIA's own words."""

    exit_code = 2

    def __init__(self, product: Product, path: Path, reasons: Sequence[str], *, fix: str) -> None:
        self.reasons = tuple(reasons)
        super().__init__(
            f"{product.name} cannot build {path.name}", got="; ".join(reasons) or "no reason given", fix=fix
        )


def has_module(product: Product) -> bool:
    """Whether the product's Python module is installed (it is not imported)."""
    return importlib.util.find_spec(product.module) is not None


def has_nvidia_gpu() -> bool:
    """Whether CUDA finds a device."""
    import torch

    return bool(torch.cuda.is_available())


def require_product(product: Product) -> str:
    """The installed version; MissingBackendError when the library, or the GPU that it builds on, is not here."""
    if not has_module(product):
        raise MissingBackendError(
            f"{product.name} is not installed", expected=f"the Python module {product.module}", fix=product.install
        )
    if product.needs_gpu and not has_nvidia_gpu():
        raise MissingBackendError(
            f"{product.name} needs an NVIDIA GPU to build an engine, and there is none here",
            fix="run on a GPU machine, or build with --backend tensorrt-rtx or onnxruntime",
        )
    return product_version(product)


def product_version(product: Product) -> str:
    """The version of the distribution that holds the product's module."""
    names = metadata.packages_distributions().get(product.module, [])
    versions = sorted({metadata.version(name) for name in names})
    return versions[-1] if versions else "unknown"


def build(
    product: Product,
    path: Path,
    engine: Path,
    config: HSTUConfig,
    name: EntryName,
    settings: BuildSettings,
    *,
    timing_cache: Path | None = None,
) -> dict[str, int]:
    """Write the engine of the entry `name`, from the ONNX file at `path`; returns how often the builder warned of what.

    The engine takes every shape in `dynamic_ranges`. `timing_cache` is read when it is there and written
    back, so that a second build takes the same tactics (TensorRT alone: TensorRT-RTX measures on the user's
    GPU). Raises MissingBackendError, or RejectedError with the reasons the product gave.
    """
    require_product(product)
    request = {
        "module": product.module,
        "profiles": [profile(config, name)],
        "tf32": settings.tf32,
        "optimization_level": settings.optimization_level,
        "workspace_mib": settings.workspace_mib,
    }
    # The worker sees a folder and file names that are the same in every build: no path reaches the engine.
    with tempfile.TemporaryDirectory(prefix="hstu-") as name_of_folder:
        folder = Path(name_of_folder)
        shutil.copyfile(path, folder / tensorrt_worker.MODEL)  # a link would tell the parser where it leads
        if (path.parent / WEIGHTS).is_file():
            shutil.copyfile(path.parent / WEIGHTS, folder / WEIGHTS)
        if timing_cache is not None and timing_cache.is_file():
            shutil.copyfile(timing_cache, folder / tensorrt_worker.TIMING_CACHE)
        result = _run_worker(request, folder=folder, what=path.name)
        if not result["errors"] and not product.needs_gpu:
            _build_until_equal(request, folder, what=path.name)
        if not result["errors"]:
            shutil.move(folder / tensorrt_worker.ENGINE, engine)
        if timing_cache is not None and (folder / tensorrt_worker.TIMING_CACHE).is_file():
            shutil.move(folder / tensorrt_worker.TIMING_CACHE, timing_cache)
    if result["errors"]:
        memory = any("OutOfMemory" in reason for reason in result["errors"])
        raise RejectedError(
            product,
            path,
            result["errors"],
            fix="raise build-engine.workspace_mib, or lower MAX_BATCH or MAX_CANDIDATES in hstu/signature.py"
            if memory
            else "look at the node it names; the other backends do not depend on this product",
        )
    return dict(result["warnings"])


def profile(config: HSTUConfig, name: EntryName) -> dict[str, list[list[int]]]:
    """One optimisation profile that holds every shape of `dynamic_ranges`: (min, typical, max) by input."""
    ranges = dynamic_ranges(config)
    return {
        spec.name: [
            [size if isinstance(size, int) else ranges[size][which] for size in spec.shape] for which in range(3)
        ]
        for spec in entry(config, name).inputs
    }


def _build_until_equal(request: dict[str, Any], folder: Path, *, what: str) -> None:
    """The engine in `folder` is the one that came out twice.

    About one TensorRT-RTX build in forty numbers its symbols in another order, for no reason of ours; the
    same inputs should give the same artifact all the same.
    """
    seen = {sha256_file(folder / tensorrt_worker.ENGINE)}
    for _ in range(MAX_BUILDS - 1):
        _run_worker(request, folder=folder, what=what)
        digest = sha256_file(folder / tensorrt_worker.ENGINE)
        if digest in seen:
            return
        seen.add(digest)
    raise GateError(
        f"{MAX_BUILDS} builds of {what} gave {MAX_BUILDS} different engines",
        expected="the same bytes twice",
        fix="run build-engine again on a quieter machine",
    )


def _run_worker(request: dict[str, Any], *, folder: Path, what: str) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    keep = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HOME")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    finished = subprocess.run(
        [sys.executable, "-m", "stages.tensorrt_worker"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, **_SAME_ADDRESSES, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"},
        check=False,
    )
    if finished.returncode != 0:
        raise MissingBackendError(
            f"the {request['module']} builder ended with status {finished.returncode} while building {what}",
            got=finished.stderr.strip()[-2000:] or "no message",
            fix="a negative status is a crash or a kill (often too little memory)",
        )
    return json.loads(finished.stdout)  # type: ignore[no-any-return]
