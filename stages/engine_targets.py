"""The backends that build-engine knows: what each needs, and which of them `auto` takes.

A further backend is one more entry of TARGETS (and of `serving.engine.BACKENDS`, when it runs).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from hstu.errors import MissingBackendError
from stages import tensorrt_builder
from stages.tensorrt_builder import TENSORRT, TENSORRT_RTX, Product


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One backend. `require` returns the version of what runs the engine, or raises MissingBackendError."""

    backend: str
    product: str
    require: Callable[[], str]
    executed: bool  # False: engines are built here and run elsewhere
    native_bf16: bool  # False: bf16 graphs compute in float32 and round
    around_int8: str  # what int8 leaves is in this type, unless build-engine.int8_around says otherwise
    builder: Product | None = None  # what compiles the ONNX files further


def _require_onnxruntime() -> str:
    return _require("onnxruntime", "onnxruntime")


def _require(module: str, distribution: str) -> str:
    if importlib.util.find_spec(module) is None:
        raise MissingBackendError(f"{distribution} is not installed", fix="make environment (see README.md)")
    return metadata.version(distribution)


TARGETS = {
    target.backend: target
    for target in (
        Target(
            backend="tensorrt",
            product=TENSORRT.name,
            require=lambda: tensorrt_builder.require_product(TENSORRT),
            executed=True,
            native_bf16=True,
            around_int8="fp16",
            builder=TENSORRT,
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
            require=lambda: tensorrt_builder.require_product(TENSORRT_RTX),
            executed=False,
            native_bf16=True,
            around_int8="fp16",
            builder=TENSORRT_RTX,
        ),
    )
}
AUTO = ("tensorrt", "onnxruntime")  # the first that is here; tensorrt-rtx never: its engines do not run here


def choose(backend: str) -> tuple[Target, str]:
    """The target that a value of `build-engine.backend` means, and why; MissingBackendError when it is not here."""
    if backend != "auto":
        if backend not in TARGETS:
            raise MissingBackendError(
                f"this build has no backend {backend!r}", expected=", ".join(TARGETS), fix="use --backend auto"
            )
        TARGETS[backend].require()
        return TARGETS[backend], "asked for"
    passed_over = []
    for name in AUTO:
        try:
            TARGETS[name].require()
        except MissingBackendError as error:
            passed_over.append(error.what)
            continue
        return TARGETS[name], "; ".join((*passed_over, f"{TARGETS[name].product} is here"))
    raise MissingBackendError("no backend is here", got="; ".join(passed_over), fix="make environment (see README.md)")
