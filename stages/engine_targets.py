"""The backends that build-engine knows: what each needs, and which of them `auto` takes.

A further backend is one more entry of TARGETS (and of `serving.engine.BACKENDS`, when it runs).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hstu.errors import MissingBackendError, ParameterError
from kernels.cpu.cache import user_cache
from kernels.cpu.library import KernelError, compiler_version
from kernels.cpu.library import build as build_kernels
from stages.tensorrt.products import TENSORRT, TENSORRT_RTX, Product, require_product


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One backend. `require` returns the version of what runs the engine, or raises MissingBackendError."""

    backend: str
    product: str
    require: Callable[[], str]
    executed: bool  # False: engines are built here and run elsewhere
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8")
    native_bf16: bool  # False: bf16 graphs compute in float32 and round
    around_int8: str  # what int8 leaves is in this type, unless build-engine.int8_around says otherwise
    int8_keep_wide: tuple[str, ...] = ("output", "hidden", "logits")  # unless the parameter of that name says otherwise
    packed: bool = False  # graphs without padding are the faster ones (docs/PERFORMANCE.md)
    builder: Product | None = None  # what compiles the ONNX files further
    add_files: Callable[[Path], None] | None = None  # writes what the engine needs besides the graphs


def _require_onnxruntime() -> str:
    return _require("onnxruntime")


def _require_openvino() -> str:
    version = _require("openvino")
    try:
        compiler_version()
    except KernelError as error:
        raise MissingBackendError(
            "the kernels of the openvino engine cannot be compiled here",
            got=str(error),
            fix="install g++ 12 or newer (only building needs it), or use --backend onnxruntime",
        ) from None
    return version


def _add_kernels(folder: Path) -> None:
    try:
        build_kernels(folder, cache=user_cache())
    except KernelError as error:
        raise MissingBackendError(
            "the kernels of the openvino engine cannot be compiled here",
            got=str(error),
            fix="install g++ 12 or newer (only building needs it), or use --backend onnxruntime",
        ) from None


def _require(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        raise MissingBackendError(f"{module} is not installed", fix="make environment (see README.md)")
    return metadata.version(module)


TARGETS = {
    target.backend: target
    for target in (
        Target(
            backend="tensorrt",
            product=TENSORRT.name,
            require=lambda: require_product(TENSORRT),
            executed=True,
            native_bf16=True,
            around_int8="fp16",
            builder=TENSORRT,
        ),
        Target(
            backend="openvino",
            product="OpenVINO",
            require=_require_openvino,
            executed=True,
            precisions=("fp32", "bf16", "int8"),
            native_bf16=True,
            around_int8="bf16",
            int8_keep_wide=("hidden", "logits"),  # each row of W_o's input has a scale of its own
            packed=True,
            add_files=_add_kernels,
        ),
        Target(
            backend="onnxruntime",
            product="ONNX Runtime",
            require=_require_onnxruntime,
            executed=True,
            native_bf16=False,
            around_int8="fp32",  # its CPU kernels have no other
        ),
        Target(
            backend="tensorrt-rtx",
            product=TENSORRT_RTX.name,
            require=lambda: require_product(TENSORRT_RTX),
            executed=False,
            native_bf16=True,
            around_int8="fp16",
            builder=TENSORRT_RTX,
        ),
    )
}
# The first that is here; tensorrt-rtx never: its engines do not run here.
AUTO = ("tensorrt", "openvino", "onnxruntime")


def choose(backend: str, precision: str) -> tuple[Target, str]:
    """The target that a value of `build-engine.backend` means for a precision, and why it is that one.

    Raises MissingBackendError when it is not here, ParameterError when it was asked for and has not that precision.
    """
    if backend != "auto":
        target = TARGETS[backend]
        if precision not in target.precisions:
            raise ParameterError(
                f"build-engine: {target.product} has no {precision} engine here",
                expected=", ".join(target.precisions),
                fix="use another precision, or --backend auto",
            )
        target.require()
        return target, "asked for"
    passed_over = []
    for name in AUTO:
        target = TARGETS[name]
        if precision not in target.precisions:
            passed_over.append(f"{target.product} has no {precision} engine here")
            continue
        try:
            target.require()
        except MissingBackendError as error:
            passed_over.append(error.what)
            continue
        return target, "; ".join((*passed_over, f"{target.product} is here"))
    raise MissingBackendError("no backend is here", got="; ".join(passed_over), fix="make environment (see README.md)")
