"""A model repository for NVIDIA's Triton Inference Server: one model per entry, for ONNX Runtime and for TensorRT.

    tritonserver --model-repository=BUNDLE/model_repository/onnx
    tritonserver --model-repository=BUNDLE/model_repository/tensorrt

Requests of equal shape are batched by the server; clients pad histories to a few lengths so that shapes are equal.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hstu.config import HSTUConfig
from hstu.signature import MAX_BATCH, EntryName, TensorSpec, entry, entry_names
from serving.engine import EngineSpec, read_spec
from stages.gpu_kit.commands import PROFILES

FOLDER = "model_repository"
_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}


def write_model_repository(bundle: Path) -> None:
    """`model_repository/onnx` serves as it is; `model_repository/tensorrt` where the bundle has plans.

    The first engine of each backend that the bundle has gives the files, as copies: the server wants each model whole
    in its folder, and ONNX refuses weights that have a second link. Without an engine of TensorRT its configs alone are
    written; `gpu-check` makes a repository of the plans that it builds.
    """
    config = HSTUConfig.from_pretrained(bundle)
    folders = sorted(path for path in (bundle / "engines").iterdir() if path.is_dir())
    specs = {folder: read_spec(folder) for folder in folders}
    for kind, backend in (("onnx", "onnxruntime"), ("tensorrt", "tensorrt")):
        source = next((folder for folder, spec in specs.items() if spec.backend == backend), None)
        write_models(config, kind, bundle / FOLDER / kind, source)


def write_models(config: HSTUConfig, kind: str, repository: Path, source: Path | None) -> None:
    """`repository` has a model for every entry, with the files of the engine folder `source` as version 1."""
    spec = None if source is None else read_spec(source)
    profiles = PROFILES if spec is None or source is None or kind == "onnx" else _profiles(source)
    for name in entry_names(config):
        model = repository / f"hstu_{name}"
        model.mkdir(parents=True)
        (model / "config.pbtxt").write_text(server_config(config, name, kind, profiles))
        if source is not None and spec is not None:
            add_version(source, spec, name, model / "1" / ("model.onnx" if kind == "onnx" else "model.plan"))


def _profiles(source: Path) -> tuple[str, ...]:
    from serving.engines.tensorrt_facts import read_facts

    return tuple(read_facts(source).settings["profiles"])


def add_version(source: Path, spec: EngineSpec, name: EntryName, target: Path) -> None:
    """`target` is the entry's file of an engine folder, its weights beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / spec.entries[name], target)
    if target.suffix == ".onnx" and (source / "weights.bin").is_file():
        shutil.copyfile(source / "weights.bin", target.parent / "weights.bin")


def server_config(config: HSTUConfig, name: EntryName, kind: str, profiles: tuple[str, ...] = PROFILES) -> str:
    """The text of a config.pbtxt: inputs and outputs without their batch axis, dynamic batching, instances."""
    signature = entry(config, name)
    backend, file = ("onnxruntime", "model.onnx") if kind == "onnx" else ("tensorrt", "model.plan")
    numbers = ", ".join(f'"{number}"' for number in range(len(profiles)))
    group = "count: 1 kind: KIND_AUTO" if kind == "onnx" else f"count: 1 kind: KIND_GPU profile: [ {numbers} ]"
    blocks = [f"input {{\n{_tensor(spec)}\n}}" for spec in signature.inputs]
    blocks += [f"output {{\n{_tensor(spec)}\n}}" for spec in signature.outputs]
    return "\n".join(
        [
            f'name: "hstu_{name}"',
            f'backend: "{backend}"',
            f'default_model_filename: "{file}"',
            f"max_batch_size: {MAX_BATCH}",
            *blocks,
            "dynamic_batching { preferred_batch_size: [ 8, 32, 64 ] max_queue_delay_microseconds: 2000 }",
            f"instance_group {{ {group} }}",
            "",
        ]
    )


def _tensor(spec: TensorSpec) -> str:
    """dims know no batch axis; a tensor that is nothing but that axis is one number a request for the server."""
    dims = [str(size) if isinstance(size, int) else "-1" for size in spec.shape[1:]]
    lines = [f'  name: "{spec.name}"', f"  data_type: {_TYPES[spec.dtype]}", f"  dims: [ {', '.join(dims or ['1'])} ]"]
    return "\n".join([*lines, *([] if dims else ["  reshape { shape: [ ] }"])])
