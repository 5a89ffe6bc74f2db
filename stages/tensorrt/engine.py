"""All entries of an engine folder built by one of NVIDIA's products, and `build.json` that says how."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

from hstu.artifact import sha256_file
from hstu.config import HSTUConfig
from hstu.errors import ParameterError
from hstu.signature import EntryName, entry_names, profile_shapes
from serving.engines.tensorrt_facts import BuildFacts, Device, EntryFacts, current_device
from stages.contract import say
from stages.tensorrt import timing_cache
from stages.tensorrt.builder import BuildSettings, build
from stages.tensorrt.plugin_graph import write_plugin_graph
from stages.tensorrt.plugin_kernel import write_kernel
from stages.tensorrt.products import Product, require_product

TIMING_CACHE = "timing.cache"  # of the engine folder: what a rebuild on the same GPU starts from


def compile_entries(
    product: Product, folder: Path, config: HSTUConfig, settings: BuildSettings, *, timing_caches: Path | None
) -> dict[str, str]:
    """Engine file by entry, each built from `<entry>.onnx` in the folder; `build.json` says by what and how.

    With the attention plugin (settings.tensorrt_attention) its kernel is compiled for this GPU into the folder, and an
    entry is built from `<entry>.plugin.onnx`, written beside `<entry>.onnx`.

    Where the builder measures tactics (TensorRT, on a GPU), the timing cache of this GPU and version is taken from
    `timing_caches` and kept there, and a copy stays in the folder. `<entry>.inspector.json` holds the layers of each
    engine where it can be loaded. Raises as `build` does, and ArtifactError when the timing cache is damaged.
    """
    version = require_product(product)
    device = current_device() if product.needs_gpu else None
    sources, plugins = _with_plugin(folder, config, settings, product, device)
    entries: dict[str, EntryFacts] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / TIMING_CACHE if device is not None else None
        if cache is not None and timing_caches is not None and device is not None:
            timing_cache.take(timing_caches, timing_cache.cache_name(product.name, version, device), cache)
        for name in entry_names(config):
            file = f"{name}{product.suffix}"
            source = sources[name]
            used = [folder / plugin for plugin in plugins] if source != f"{name}.onnx" else []
            built = build(
                product, folder / source, folder / file, config, name, settings, timing_cache=cache, plugin=used
            )
            entries[name] = EntryFacts(
                file=file,
                sha256=sha256_file(folder / file),
                bytes=(folder / file).stat().st_size,
                onnx=source,
                profiles=tuple({"name": p, "shapes": profile_shapes(config, name, p)} for p in settings.profiles),
                warnings=built.warnings,
                memory=built.memory,
                layers=built.layers,
            )
            if built.inspector is not None:
                (folder / f"{name}.inspector.json").write_text(built.inspector)
            say(f"build-engine: {product.name} {version} built {file}: {_summary(entries[name])}")
        if cache is not None and cache.is_file():
            _keep_cache(cache, folder, timing_caches, product, version, device)
    facts = BuildFacts(
        product=product.name,
        module=product.module,
        version=version,
        executed=product.needs_gpu,
        device=device,
        settings=asdict(settings),
        entries=entries,
        plugins=plugins,
    )
    facts.write(folder)
    return {name: entry.file for name, entry in entries.items()}


def _with_plugin(
    folder: Path, config: HSTUConfig, settings: BuildSettings, product: Product, device: Device | None
) -> tuple[dict[EntryName, str], dict[str, str]]:
    """The ONNX file of every entry, and the plugin's files with their SHA-256: none where there is no plugin."""
    sources: dict[EntryName, str] = {name: f"{name}.onnx" for name in entry_names(config)}
    if settings.tensorrt_attention == "function":
        return sources, {}
    stray = [name for name in ("refit", "strip_plan", "version_compatible") if getattr(settings, name)]
    stray += ["hardware_compatibility"] if settings.hardware_compatibility != "none" else []
    if device is None or stray:
        raise ParameterError(
            "build-engine.tensorrt_attention: there is no attention plugin for this engine",
            got=product.name if device is None else f"plugin with {', '.join(stray)}",
            expected="TensorRT, for the GPU of this machine and its version alone",
            fix="set build-engine.tensorrt_attention: function",
        )
    written: dict[EntryName, tuple[str, str | None]] = {
        name: write_plugin_graph(folder, name, config) for name in sources
    }
    dtypes = {dtype for _, dtype in written.values() if dtype is not None}
    if len(dtypes) != 1:
        raise ParameterError(
            "build-engine.tensorrt_attention: the plugin has nothing to compute in this model",
            got=f"attention in {sorted(dtypes)}",
            expected="two layers or more, all in one type",
            fix="set build-engine.tensorrt_attention: function",
        )
    sm = int(device.sm.replace(".", ""))
    say(f"build-engine: compiling the attention plugin's kernel, {min(dtypes)} for sm_{sm}")
    sources = {name: file for name, (file, _) in written.items()}
    return sources, write_kernel(folder, config, min(dtypes), sm)


def _keep_cache(
    cache: Path, folder: Path, timing_caches: Path | None, product: Product, version: str, device: Device | None
) -> None:
    (folder / TIMING_CACHE).write_bytes(cache.read_bytes())
    if timing_caches is not None and device is not None:
        timing_cache.keep(cache, timing_caches, timing_cache.cache_name(product.name, version, device))


def _summary(entry: EntryFacts) -> str:
    """The build log in one line."""
    layers = sum(entry.layers.values())
    memory = {name: size / 2**20 for name, size in entry.memory.items()}
    sizes = ", ".join(
        f"{name.removesuffix('_bytes').replace('_', ' ')} {size:.1f} MiB" for name, size in memory.items()
    )
    return f"{entry.bytes / 2**20:.1f} MiB, {layers} layers; {sizes}; {sum(entry.warnings.values())} warnings"
