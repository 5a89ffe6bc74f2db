"""TensorRT and TensorRT-RTX on an NVIDIA GPU: an engine file per entry, one context each, one stream for all.

The two products have the same interface here and nothing else in common: a `.plan` is TensorRT's, an
`.rtx` is TensorRT-RTX's, and neither loads the other's.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from hstu.config import HSTUConfig
from hstu.errors import ArtifactError, InputError, MissingBackendError
from hstu.signature import EntryName, entry, entry_names
from serving.engine import Array, EngineSpec

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_PROFILE = 0


class TensorRTEngine:
    """Runs the engines of a folder on the current CUDA device; inputs and outputs are on the host."""

    def __init__(self, folder: Path, spec: EngineSpec) -> None:
        self.backend = spec.backend
        self.precision = spec.precision
        self.config = HSTUConfig.from_pretrained(folder)
        trt = _require(MODULES[spec.backend])
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream: Any = torch.cuda.Stream(self._device)
        self._lock = threading.Lock()  # a context serves one request at a time
        self._logger = _collecting_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        missing = sorted(set(entry_names(self.config)) - set(spec.entries))
        if missing:
            raise ArtifactError(f"{folder}: engine.json lacks entries of this model", expected=missing)
        self._engines = {name: self._load(trt, folder / file) for name, file in spec.entries.items()}
        self._contexts = {name: engine.create_execution_context() for name, engine in self._engines.items()}

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The entry's outputs by name. Feeds must have passed `check_feeds`.

        Raises InputError when a shape lies outside the profile that the engine was built for.
        """
        if entry not in self._contexts:
            raise InputError(f"this engine has no {entry!r} entry", expected=", ".join(self._contexts))
        engine, context = self._engines[entry], self._contexts[entry]
        with self._lock, torch.cuda.stream(self._stream):
            inputs = {name: torch.as_tensor(value).to(self._device) for name, value in feeds.items()}
            for name, tensor in inputs.items():
                _check_profile(engine, name, tuple(tensor.shape))
                context.set_input_shape(name, tuple(tensor.shape))
                context.set_tensor_address(name, tensor.data_ptr())
            outputs = self._outputs(entry, context)
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise ArtifactError(f"{entry}: the engine did not run", got="; ".join(self._logger.errors))
            return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}  # waits for the stream

    def close(self) -> None:
        """Release device memory; the engine must not be used after."""
        self._contexts.clear()
        self._engines.clear()

    def _load(self, trt: Any, path: Path) -> Any:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error})", fix="run build-engine again") from None
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise ArtifactError(
                f"{path}: {trt.__name__} {trt.__version__} on {torch.cuda.get_device_name()} cannot load this engine",
                got="; ".join(self._logger.errors) or "no reason given",
                expected="the version and the GPU named in manifest.json, under platform",
                fix="run build-engine on this machine",
            )
        return engine

    def _outputs(self, name: EntryName, context: Any) -> dict[str, torch.Tensor]:
        """Buffers of the shapes that the inputs lead to, known to the context."""
        outputs = {}
        for spec in entry(self.config, name).outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            outputs[spec.name] = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self._device)
            context.set_tensor_address(spec.name, outputs[spec.name].data_ptr())
        return outputs


def open_engine(folder: Path, spec: EngineSpec, *, threads: int | None = None) -> TensorRTEngine:  # noqa: ARG001
    """The engine of a folder, ready to run (`threads` means nothing on a GPU)."""
    return TensorRTEngine(folder, spec)


def _require(module: str) -> Any:
    """The product's Python module; MissingBackendError when it, or a GPU, is not here."""
    if importlib.util.find_spec(module) is None:
        raise MissingBackendError(
            f"{module} is not installed",
            fix=f"pip install {module.replace('_', '-')}, or use an engine of another backend",
        )
    if not torch.cuda.is_available():
        raise MissingBackendError(
            f"{module} engines run on an NVIDIA GPU, and there is none here",
            fix="run on a GPU machine, or use an onnxruntime engine (build-engine --backend onnxruntime)",
        )
    return import_module(module)


def _check_profile(engine: Any, name: str, shape: tuple[int, ...]) -> None:
    low, _, high = (tuple(dims) for dims in engine.get_tensor_profile_shape(name, _PROFILE))
    if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
        raise InputError(
            f"input {name!r} does not fit the engine",
            got=list(shape),
            expected=f"{list(low)} to {list(high)}",
            fix="split the batch, or rebuild with wider ranges (hstu/signature.py)",
        )


def _collecting_logger(trt: Any) -> Any:
    class CollectingLogger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message.strip())

    return CollectingLogger()
