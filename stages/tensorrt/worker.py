"""Builds one engine: `python -m stages.tensorrt.worker` reads a request on stdin, writes a result on stdout.

A process of its own because a native builder may crash or take memory that only its end gives back,
because polygraphy is bound to one product per process, and because TensorRT-RTX lays out part of an engine
by the addresses of its objects: see `run_in_order`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.tensorrt.log import kinds, memory, without_position

if TYPE_CHECKING:
    import tensorrt_rtx as trt
else:
    trt = None  # the product of the request, see `main`

MODEL, ENGINE, TIMING_CACHE, INSPECTOR = "model.onnx", "engine.bin", "timing.cache", "inspector.json"  # in the cwd
_ADDR_NO_RANDOMIZE = 0x0040000  # linux/personality.h
_RESTARTED = "HSTU_FIXED_ADDRESSES"


def fix_addresses() -> None:
    """This process starts again without address randomisation, once; where the kernel refuses, it goes on as it is."""
    if os.environ.get(_RESTARTED) is None and sys.platform == "linux":
        os.environ[_RESTARTED] = "1"
        if ctypes.CDLL(None).personality(_ADDR_NO_RANDOMIZE) != -1:
            os.execv(sys.executable, [sys.executable, "-m", "stages.tensorrt.worker"])


def run_in_order() -> bool:
    """Threads of this process take turns in one fixed order from now on; False where that is not allowed.

    The threads of TensorRT-RTX take memory from one heap, and what lies where decides how it numbers symbols. On one
    processor, first in first out, a thread runs until it waits, so every run takes memory in the same order.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False  # needs CAP_SYS_NICE
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return True


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Write the engine of MODEL to ENGINE; returns errors (none: it was built), warnings by kind, memory and layers.

    Raises nothing of NVIDIA's: what the parser or the builder says against the model is in `errors`, verbatim.
    """
    polygraphy: Any = import_module("polygraphy.backend.trt")
    import_module("polygraphy.logger").G_LOGGER.module_severity = 10**6  # ours collects what matters; stdout is ours
    logger = collecting_logger()
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(request["module"], trt.__version__))
    trt.init_libnvinfer_plugins(logger, "")
    if request["plugin"]:
        register_plugin(*map(Path, request["plugin"]))
    parser = trt.OnnxParser(network, logger)

    def result(errors: list[str], **more: Any) -> dict[str, Any]:
        return {"errors": errors, "warnings": kinds(logger.warnings), "memory": memory(logger.infos), **more}

    if not parser.parse_from_file(MODEL):
        reasons = [_reason(parser.get_error(index)) for index in range(parser.num_errors)]
        return result(reasons or logger.errors or ["the parser gives no reason"])
    layers = layer_types(network)
    config = make_config(polygraphy, request, builder, network)
    ignored = [text for text in logger.warnings if "is unsupported in" in text]  # TensorRT-RTX would go on without
    if isinstance(config, str) or ignored:
        return result(ignored or [str(config)])
    save = TIMING_CACHE if request["module"] == "tensorrt" else None  # TensorRT-RTX measures on the user's GPU
    try:
        data = polygraphy.EngineBytesFromNetwork(
            (builder, network, parser), lambda *_: config, save_timing_cache=save
        )()
    except import_module("polygraphy.exception").PolygraphyException as error:
        return result(logger.errors or [str(error)])
    except MemoryError:
        return result([*logger.errors, "MemoryError while the engine was built"])
    Path(ENGINE).write_bytes(data)
    if request["inspect"]:
        inspect(logger, data)
    return result([], layers=layers)


def network_flags(module: str, version: str) -> int:
    """The flags with which every network is strongly typed; from TensorRT 11 on there is no other kind, and no flag."""
    if module == "tensorrt" and int(version.partition(".")[0]) >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def make_config(
    polygraphy: Any, request: dict[str, Any], builder: trt.Builder, network: trt.INetworkDefinition
) -> trt.IBuilderConfig | str:
    """polygraphy's config of either product, or what this version of it lacks.

    No precision flag and no calibrator exists here: TensorRT 11 has none. TF32 is set one way or the other, never
    left to a default.
    """
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
        "refittable": request["refit"],
        "strip_plan": request["strip_plan"],
        "weight_streaming": request["weight_streaming"],
        "version_compatible": request["version_compatible"],
    }
    if request["hardware_compatibility"] != "none":
        levels = trt.HardwareCompatibilityLevel.__members__
        level = request["hardware_compatibility"].upper()
        if level not in levels:
            return f"{request['module']} {trt.__version__} has no hardware compatibility level {level}"
        options["hardware_compatibility_level"] = levels[level]
    if request["module"] == "tensorrt_rtx":
        config = import_module("polygraphy.backend.tensorrt_rtx").CreateConfigRTX(**options)(builder, network)
    else:
        config = polygraphy.CreateConfig(tf32=request["tf32"], **options)(builder, network)
    (config.set_flag if request["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
    return config  # type: ignore[no-any-return]


def register_plugin(ptx: Path, description: Path) -> None:
    """The parser knows our attention plugin, computed by the kernel in these files."""
    plugin: Any = import_module("stages.tensorrt.plugin")  # TensorRT's alone, and read there when it is imported
    plugin.register(json.loads(description.read_text()), ptx.read_text())


def layer_types(network: trt.INetworkDefinition) -> dict[str, int]:
    """How many layers of which kind give which type, as "NORMALIZATION FLOAT": what the parser made of the graph."""
    found: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        found[f"{layer.type.name} {layer.get_output(0).dtype.name}"] += 1
    return dict(sorted(found.items()))


def inspect(logger: trt.ILogger, data: bytes) -> None:
    """INSPECTOR holds every layer of the engine as its product tells it (only a GPU can load an engine)."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(data)
    if engine is not None:
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        Path(INSPECTOR).write_text(text)


def _reason(error: trt.ParserError) -> str:
    where = "".join(f" in {name}" for name in error.local_function_stack())
    return f"{error.node_operator()} {error.node_name()!r}{where}: {error.desc()}"


def collecting_logger() -> Any:
    """A logger of the product that keeps errors, warnings and information, without source positions."""

    class CollectingLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.infos: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            text = without_position(msg)
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(text)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(text)
            elif severity == trt.ILogger.Severity.INFO:
                self.infos.append(text)

    return CollectingLogger()


def use_product(module: str) -> None:
    """`trt` is the product's module, and polygraphy is bound to it."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(module == "tensorrt_rtx"))
    globals()["trt"] = import_module(module)


def main() -> None:
    """Read the request, build, write the result."""
    request = json.load(sys.stdin)
    in_order = request["module"] == "tensorrt_rtx" and run_in_order()  # before anything starts a thread
    use_product(request["module"])
    json.dump({**build(request), "in_order": in_order}, sys.stdout)


if __name__ == "__main__":
    fix_addresses()
    main()
