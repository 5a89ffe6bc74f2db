"""NVIDIA's two products: which module each is, what it needs, and what it says when it refuses a model.

TensorRT and TensorRT-RTX share our code and nothing else: an engine of one cannot be loaded by the other, and
what was built with TensorRT-RTX is never called TensorRT.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hstu.errors import CompilerError, MissingBackendError


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One of the two: `module` is its Python module, `suffix` that of the engines it makes."""

    name: str
    backend: str
    module: str
    suffix: str
    needs_gpu: bool  # to build
    versions: tuple[int, int]  # major versions that this code is written for, both included
    install: str


TENSORRT = Product(
    name="TensorRT",
    backend="tensorrt",
    module="tensorrt",
    suffix=".plan",
    needs_gpu=True,
    versions=(10, 11),
    install="pip install tensorrt (10.x or 11.x) on a machine with an NVIDIA GPU",
)
TENSORRT_RTX = Product(
    name="TensorRT-RTX",
    backend="tensorrt-rtx",
    module="tensorrt_rtx",
    suffix=".rtx",
    needs_gpu=False,
    versions=(1, 1),
    install="pip install tensorrt-rtx",
)
PRODUCTS = {product.backend: product for product in (TENSORRT, TENSORRT_RTX)}

LOWER = (
    "lower build-engine.optimization_level or workspace_mib, have fewer build-engine.profiles, or lower MAX_BATCH or "
    "MAX_CANDIDATES in hstu/signature.py"
)
RAISE = (
    "raise build-engine.workspace_mib: what the largest profile computes at once must fit. Where the device has no "
    "more, have fewer build-engine.profiles, or lower MAX_BATCH or MAX_CANDIDATES in hstu/signature.py"
)


class RejectedError(CompilerError):
    """The parser or the builder refused a model; `reasons` are NVIDIA's own words."""

    exit_code = 2

    def __init__(self, product: Product, path: Path, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(
            f"{product.name} cannot build {path.name}",
            got="; ".join(reasons) or "no reason given",
            fix=_fix(" ".join(reasons)),
        )


def _fix(reasons: str) -> str:
    text = reasons.lower().replace("_", "").replace(" ", "")
    if "outofmemory(requestedsize" in text:  # of the workspace, not of the device
        return RAISE
    if any(word in text for word in ("outofmemory", "badalloc", "memoryerror", "cudaerror2)")):
        return LOWER
    if "insufficientmemory" in text or "workspace" in text:
        return RAISE
    if "cudasuccess" in text or "cudaruntime" in text:
        return "build where a GPU is: build-engine.refit and strip_plan need one"
    if "libnvinferlean" in text:
        return "set build-engine.version_compatible: false, or install NVIDIA's lean runtime beside this library"
    if "unsupported" in text:
        return "set the build-engine option that it names back to its default: this product does not have it"
    if "timingcache" in text:
        return "delete the file of the timing cache; it is made anew"
    return "look at the node it names, which is called after the module it came from; other backends do not mind it"


def has_module(product: Product) -> bool:
    """Whether the product's Python module is installed (it is not imported)."""
    return importlib.util.find_spec(product.module) is not None


def has_nvidia_gpu() -> bool:
    """Whether CUDA finds a device."""
    import torch

    return bool(torch.cuda.is_available())


def require_product(product: Product) -> str:
    """The installed version; MissingBackendError when the library, a version that we know, or its GPU is not here."""
    if not has_module(product):
        raise MissingBackendError(
            f"{product.name} is not installed", expected=f"the Python module {product.module}", fix=product.install
        )
    version = product_version(product)
    low, high = product.versions
    if not low <= int(version.partition(".")[0]) <= high:
        raise MissingBackendError(
            f"this code does not know {product.name} {version}",
            expected=f"{low}.x" if low == high else f"{low}.x to {high}.x",
            fix=product.install,
        )
    if product.needs_gpu and not has_nvidia_gpu():
        raise MissingBackendError(
            f"{product.name} needs an NVIDIA GPU to build an engine, and there is none here",
            fix="run on a GPU machine, or build with --backend tensorrt-rtx or onnxruntime",
        )
    return version


def product_version(product: Product) -> str:
    """The version of the distribution that holds the product's module."""
    names = metadata.packages_distributions().get(product.module, [])
    versions = sorted({metadata.version(name) for name in names})
    if not versions:
        raise MissingBackendError(
            f"the module {product.module} belongs to no installed distribution", fix=product.install
        )
    return versions[-1]
