"""TensorRT and TensorRT-RTX on an NVIDIA GPU, behind the common interface; inputs and outputs are on the host.

The two products have the same interface here and nothing else in common: a `.plan` is TensorRT's, an
`.rtx` is TensorRT-RTX's, and neither loads the other's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu.config import HSTUConfig
from hstu.errors import ArtifactError, InputError, UsageError
from hstu.signature import EntryName, entry, entry_names
from serving.engine import Array, EngineSpec
from serving.engines.tensorrt_entry import EntryOnDevice
from serving.engines.tensorrt_facts import BuildFacts, EntryFacts, current_device, read_facts, require_same

if TYPE_CHECKING:
    import tensorrt_rtx as trt

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


class TensorRTEngine:
    """Runs the engines of a folder on the current CUDA device."""

    def __init__(self, folder: Path, spec: EngineSpec) -> None:
        self.backend = spec.backend
        self.precision = spec.precision
        self.config = HSTUConfig.from_pretrained(folder)
        facts = preflight(folder, spec)
        missing = sorted(set(entry_names(self.config)) - set(facts.entries))
        if missing:
            raise ArtifactError(f"{folder}: build.json lacks entries of this model", expected=missing)
        self._loader = _Loader(MODULES[spec.backend], folder, facts)
        self._entries = {
            name: EntryOnDevice(
                self._loader.load(facts.entries[name]), entry(self.config, name), _profiles(facts.entries[name])
            )
            for name in entry_names(self.config)
        }

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The entry's outputs by name. Feeds must have passed `check_feeds`.

        Raises InputError when a shape lies outside every profile that the engine was built for.
        """
        if entry not in self._entries:
            raise InputError(
                f"this engine has no {entry!r} entry", expected=", ".join(self._entries) or "an open engine"
            )
        return self._entries[entry].run(feeds)

    def close(self) -> None:
        """Release device memory; the engine must not be used after."""
        self._entries.clear()


class _Loader:
    """Deserialises engines of one product; the library's own words go into the error when it refuses one."""

    def __init__(self, module: str, folder: Path, facts: BuildFacts) -> None:
        if TYPE_CHECKING:
            self.trt = trt
        else:
            self.trt = import_module(module)
        self.folder, self.facts = folder, facts
        self.logger = _collecting_logger(self.trt)
        self.runtime = self.trt.Runtime(self.logger)
        if facts.settings.get("version_compatible"):
            self.runtime.engine_host_code_allowed = True  # such a plan carries a small runtime of its own version

    def load(self, facts: EntryFacts) -> trt.ICudaEngine:
        """The engine of an entry, with its weights."""
        engine = self.runtime.deserialize_cuda_engine((self.folder / facts.file).read_bytes())
        if engine is None:
            raise ArtifactError(
                f"{self.folder / facts.file}: {self.facts.product} {self.facts.version} cannot load this engine",
                got="; ".join(self.logger.errors) or "no reason given",
                fix="run build-engine on this machine",
            )
        if self.facts.settings.get("strip_plan"):
            self._refit(engine, facts)
        if self.facts.settings.get("weight_streaming"):
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine

    def _refit(self, engine: trt.ICudaEngine, facts: EntryFacts) -> None:
        """A stripped engine gets the weights of its ONNX file."""
        refitter = self.trt.Refitter(engine, self.logger)
        parser = self.trt.OnnxParserRefitter(refitter, self.logger)
        if not parser.refit_from_file(str(self.folder / facts.onnx)) or not refitter.refit_cuda_engine():
            raise ArtifactError(
                f"{self.folder / facts.file}: the weights of {facts.onnx} do not fit this engine",
                got="; ".join(self.logger.errors) or ", ".join(refitter.get_missing_weights()[:5]),
                fix="run build-engine again",
            )


def open_engine(folder: Path, spec: EngineSpec, *, threads: int | None = None) -> TensorRTEngine:  # noqa: ARG001
    """The engine of a folder, ready to run (`threads` means nothing on a GPU)."""
    return TensorRTEngine(folder, spec)


def preflight(folder: Path, spec: EngineSpec) -> BuildFacts:
    """What the engines were built with; raises unless the library, its version, the GPU and every file are the same."""
    if spec.backend not in MODULES:
        raise UsageError(f"{folder}: engines of {spec.backend} are not tied to a GPU", expected=", ".join(MODULES))
    facts = read_facts(folder)
    require_same(facts, folder, version=installed_version(MODULES[spec.backend]), device=current_device())
    return facts


def installed_version(module: str) -> str | None:
    """The version of the distribution that holds a product's module; None when it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    names = metadata.packages_distributions().get(module, [])
    return max((metadata.version(name) for name in names), default=None)


def _profiles(facts: EntryFacts) -> tuple[dict[str, Any], ...]:
    return tuple(
        {name: tuple(tuple(shape) for shape in shapes) for name, shapes in profile["shapes"].items()}
        for profile in facts.profiles
    )


def _collecting_logger(trt: Any) -> Any:
    class CollectingLogger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg.strip())

    return CollectingLogger()
