"""Builds one engine: `python -m stages.tensorrt_worker` reads a request on stdin, writes a result on stdout.

A process of its own because a native builder may crash or take memory that only its end gives back,
because polygraphy is bound to one product per process, and because TensorRT-RTX lays out part of an engine
by the addresses of its objects: without address randomisation the same ONNX gives the same bytes.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

MODEL, ENGINE, TIMING_CACHE = "model.onnx", "engine.bin", "timing.cache"  # in the folder it is started in
_ADDR_NO_RANDOMIZE = 0x0040000  # linux/personality.h
_FIXED = "HSTU_FIXED_ADDRESSES"


def fix_addresses() -> None:
    """This process starts again without address randomisation, once; where the kernel refuses, it goes on as it is."""
    if os.environ.get(_FIXED) is None and sys.platform == "linux":
        os.environ[_FIXED] = "1"
        if ctypes.CDLL(None).personality(_ADDR_NO_RANDOMIZE) != -1:
            os.execv(sys.executable, [sys.executable, "-m", "stages.tensorrt_worker"])


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Write the engine of MODEL to ENGINE; returns errors (none: it was built) and warnings.

    Warnings are counted by kind: one that names a node or tensor stands for all of its kind.

    Raises nothing of NVIDIA's: what the parser or the builder says against the model is in `errors`, verbatim.
    """
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(request["module"] == "tensorrt_rtx"))
    trt: Any = import_module(request["module"])
    polygraphy: Any = import_module("polygraphy.backend.trt")
    polygraphy_logger = import_module("polygraphy.logger").G_LOGGER
    polygraphy_logger.module_severity = 10**6  # says nothing: ours collects what matters, and stdout is the result's
    logger = _collecting_logger(trt)
    builder = trt.Builder(logger)
    # TensorRT 10 and TensorRT-RTX take a flag; where there is none, every network is strongly typed.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    trt.init_libnvinfer_plugins(logger, "")
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(MODEL):
        reasons = [_reason(parser.get_error(index)) for index in range(parser.num_errors)]
        return {"errors": reasons or logger.errors, "warnings": _by_kind(logger.warnings)}
    config = _config(trt, polygraphy, request, builder, network)
    save = TIMING_CACHE if request["module"] == "tensorrt" else None  # TensorRT-RTX measures on the user's GPU
    try:
        data = polygraphy.EngineBytesFromNetwork(
            (builder, network, parser), lambda *_: config, save_timing_cache=save
        )()
    except import_module("polygraphy.exception").PolygraphyException as error:
        return {"errors": logger.errors or [str(error)], "warnings": _by_kind(logger.warnings)}
    Path(ENGINE).write_bytes(data)
    return {"errors": [], "warnings": _by_kind(logger.warnings)}


def _config(trt: Any, polygraphy: Any, request: dict[str, Any], builder: Any, network: Any) -> Any:
    """polygraphy's config of either product; TF32 is set one way or the other, never left to a default."""
    profiles = []
    for shapes in request["profiles"]:
        profiles.append(polygraphy.Profile())
        for name, (low, typical, high) in shapes.items():
            profiles[-1].add(name, min=low, opt=typical, max=high)
    options: dict[str, Any] = {
        "profiles": profiles,
        "memory_pool_limits": {trt.MemoryPoolType.WORKSPACE: request["workspace_mib"] * 2**20},
        "builder_optimization_level": request["optimization_level"],
        "load_timing_cache": TIMING_CACHE if Path(TIMING_CACHE).is_file() else None,
    }
    if request["module"] == "tensorrt_rtx":
        create = import_module("polygraphy.backend.tensorrt_rtx").CreateConfigRTX(**options)
    else:
        create = polygraphy.CreateConfig(tf32=request["tf32"], **options)
    config = create(builder, network)
    (config.set_flag if request["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
    return config


def _reason(error: Any) -> str:
    where = "".join(f" in {name}" for name in error.local_function_stack())
    return f"{error.node_operator()} {error.node_name()!r}{where}: {error.desc()}"


def _by_kind(warnings: list[str]) -> dict[str, int]:
    return dict(Counter(re.sub(r"\b(named|input|output) \S+", r"\1 …", text) for text in warnings))


def _collecting_logger(trt: Any) -> Any:
    """A logger of the product that keeps errors and warnings, without the source positions it puts before them."""

    class CollectingLogger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            text = re.sub(r"^\S+\.[ch]pp:\d+: ", "", message.strip())
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(text)

    return CollectingLogger()


if __name__ == "__main__":
    fix_addresses()
    json.dump(build(json.load(sys.stdin)), sys.stdout)
