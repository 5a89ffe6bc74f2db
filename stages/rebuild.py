"""Rebuild: the engines of a folder built again on this machine, from the ONNX files that they were built from."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

from hstu.config import HSTUConfig
from hstu.errors import ArtifactError, CompilerError, UsageError
from serving.engine import read_spec
from stages.contract import say
from stages.workspace import new_folder


def rebuild(folder: Path, into: Path, *, timing_caches: Path | None = None) -> Path:
    """`into` is an engine folder like `folder`, built here with the same settings; returns it.

    Raises UsageError when the folder's engines are not built ones (ONNX Runtime's, OpenVINO's), ArtifactError when it
    does not hold the ONNX files, and as building does.
    """
    from serving.engines.tensorrt_facts import FILE, read_facts
    from stages.tensorrt.builder import BuildSettings
    from stages.tensorrt.engine import TIMING_CACHE, compile_entries
    from stages.tensorrt.products import PRODUCTS

    spec = read_spec(folder)
    if spec.backend not in PRODUCTS:
        raise UsageError(f"{folder}: engines of {spec.backend} are not tied to a machine", expected=", ".join(PRODUCTS))
    facts = read_facts(folder)
    missing = [entry.onnx for entry in facts.entries.values() if not (folder / entry.onnx).is_file()]
    if missing:
        raise ArtifactError(f"{folder}: what the engines were built from is gone", got=", ".join(missing))
    if into.exists():
        raise UsageError(f"{into}: exists already", fix="give a folder that does not")
    values = {**facts.settings, "profiles": tuple(facts.settings["profiles"])}
    settings = BuildSettings(**{item.name: values[item.name] for item in fields(BuildSettings) if item.name in values})
    own = {FILE, TIMING_CACHE, *facts.plugins, *(entry.file for entry in facts.entries.values())}
    own |= {entry.onnx for name, entry in facts.entries.items() if entry.onnx != f"{name}.onnx"}  # made of that again
    into.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(into) as temporary:
        for path in folder.iterdir():
            if path.name not in own and path.name != "manifest.json" and not path.name.endswith(".inspector.json"):
                shutil.copyfile(path, temporary / path.name)
        config = HSTUConfig.from_pretrained(temporary)
        compile_entries(PRODUCTS[spec.backend], temporary, config, settings, timing_caches=timing_caches)
        temporary.chmod(0o755)
        temporary.rename(into)
    return into


def rebuilt_if_needed(folder: Path, below: Path) -> Path | None:
    """None when the engines of `folder` run here as they are, or are not of TensorRT; else a folder of rebuilt ones.

    It stands below `below`, named after what it was built for, and is used again next time.
    """
    from serving.engines.tensorrt import MODULES, installed_version, preflight
    from serving.engines.tensorrt_facts import current_device
    from stages.tensorrt.timing_cache import cache_name

    spec = read_spec(folder)
    if spec.backend not in MODULES:
        return None
    try:
        preflight(folder, spec)
    except CompilerError as error:
        say(str(error))
    else:
        return None
    device, version = current_device(), installed_version(MODULES[spec.backend])
    if device is None or version is None:
        raise UsageError(
            f"{folder}: cannot be rebuilt for running here",
            got="no GPU" if device is None else f"no {MODULES[spec.backend]}",
            fix="leave --rebuild out: another engine of the bundle answers, and says so",
        )
    into = below / f"{folder.name}-{cache_name(spec.backend, version, device).removesuffix('.cache')}"
    if into.is_dir():
        preflight(into, spec)
        return into
    return rebuild(folder, into)
