"""TensorRT and TensorRT-RTX: a strongly typed ONNX file becomes a serialised engine.

One path serves TensorRT 10.x, TensorRT 11.x and TensorRT-RTX: every network is strongly typed, so
precision lives in the graph (casts, Q/DQ) and no precision flag or calibrator is ever passed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hstu.artifact import sha256_file
from hstu.config import HSTUConfig
from hstu.errors import GateError, MissingBackendError
from hstu.signature import EntryName, ProfileName, profile_shapes
from stages.tensorrt import worker
from stages.tensorrt.products import LOWER, Product, RejectedError, has_nvidia_gpu, require_product

WEIGHTS = "weights.bin"  # what an ONNX file may refer to, beside it
MAX_BUILDS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings:
    """What a user may tune; the engine's numerics depend on `tf32` alone. See params.yaml."""

    tf32: bool = False
    optimization_level: int = 3
    workspace_mib: int = 8192
    profiles: tuple[ProfileName, ...] = ("single", "batch", "long")
    refit: bool = False
    strip_plan: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    tensorrt_attention: Literal["function", "plugin"] = "function"


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What the builder told: warnings by kind, memory in bytes, the parser's layers; `inspector` is JSON text."""

    warnings: Mapping[str, int]
    memory: Mapping[str, int]
    layers: Mapping[str, int]
    inspector: str | None


# With these (and no address randomisation, see the worker) objects get the same addresses in every run.
_SAME_ADDRESSES = {
    "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}


def build(
    product: Product,
    path: Path,
    engine: Path,
    config: HSTUConfig,
    name: EntryName,
    settings: BuildSettings,
    *,
    timing_cache: Path | None = None,
    plugin: Sequence[Path] = (),
) -> Built:
    """Write the engine of the entry `name`, from the ONNX file at `path`; returns what the builder told.

    The engine has the profiles of `settings`, in that order. `timing_cache` is read when it is there and written
    back, so that a second build takes the same tactics (TensorRT alone: TensorRT-RTX measures on the user's
    GPU). `plugin` are the files of the kernel that a plugin in the graph is made of, PTX first. Raises
    MissingBackendError, or RejectedError with the reasons the product gave.
    """
    require_product(product)
    request = {
        "module": product.module,
        "inspect": product.needs_gpu or has_nvidia_gpu(),
        "tf32": settings.tf32,
        "optimization_level": settings.optimization_level,
        "workspace_mib": settings.workspace_mib,
        "profiles": [profile_shapes(config, name, profile) for profile in settings.profiles],
        "refit": settings.refit,
        "strip_plan": settings.strip_plan,
        "weight_streaming": settings.weight_streaming,
        "version_compatible": settings.version_compatible,
        "hardware_compatibility": settings.hardware_compatibility,
        "plugin": [file.name for file in plugin],
    }
    # The worker sees a folder and file names that are the same in every build: no path reaches the engine.
    with tempfile.TemporaryDirectory(prefix="hstu-") as name_of_folder:
        folder = Path(name_of_folder)
        shutil.copyfile(path, folder / worker.MODEL)  # a link would tell the parser where it leads
        if (path.parent / WEIGHTS).is_file():
            shutil.copyfile(path.parent / WEIGHTS, folder / WEIGHTS)
        for file in plugin:
            shutil.copyfile(file, folder / file.name)
        if timing_cache is not None and timing_cache.is_file():
            shutil.copyfile(timing_cache, folder / worker.TIMING_CACHE)
        result = _run_worker(request, folder=folder, what=path.name)
        if result["errors"]:
            raise RejectedError(product, path, result["errors"])
        if not product.needs_gpu and not result["in_order"]:
            _build_until_equal(request, folder, what=path.name)
        shutil.move(folder / worker.ENGINE, engine)
        inspector = folder / worker.INSPECTOR
        told = inspector.read_text() if inspector.is_file() else None
        if timing_cache is not None and (folder / worker.TIMING_CACHE).is_file():
            shutil.move(folder / worker.TIMING_CACHE, timing_cache)
    return Built(warnings=result["warnings"], memory=result["memory"], layers=result["layers"], inspector=told)


def _build_until_equal(request: dict[str, Any], folder: Path, *, what: str) -> None:
    """The engine in `folder` is the one that came out twice.

    Where the worker may not fix the order of its threads (`worker.run_in_order`), most graphs give the same bytes in
    every build, and of some one build in three differs in a few dozen bytes: TensorRT-RTX numbers symbols by where
    they lie in memory. The same inputs should give the same artifact all the same.
    """
    seen = {sha256_file(folder / worker.ENGINE)}
    for _ in range(MAX_BUILDS - 1):
        _run_worker(request, folder=folder, what=what)
        digest = sha256_file(folder / worker.ENGINE)
        if digest in seen:
            return
        seen.add(digest)
    raise GateError(
        f"{MAX_BUILDS} builds of {what} gave {MAX_BUILDS} different engines",
        expected="the same bytes twice",
        fix="run build-engine again on a quieter machine",
    )


def _run_worker(request: dict[str, Any], *, folder: Path, what: str) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    keep = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HOME")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    finished = subprocess.run(
        [sys.executable, "-m", "stages.tensorrt.worker"],
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
            fix=f"a negative status is a crash or a kill, often for too little memory: {LOWER}",
        )
    return json.loads(finished.stdout)  # type: ignore[no-any-return]
