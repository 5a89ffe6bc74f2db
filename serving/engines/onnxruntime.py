"""ONNX Runtime on the CPU: the portable engine, which runs every precision."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from hstu.config import HSTUConfig
from hstu.errors import ArtifactError, InputError
from hstu.signature import EntryName, entry, entry_names
from serving.engine import Array, EngineSpec

PROVIDER = "CPUExecutionProvider"
_CANNOT_LOAD = (  # ONNX Runtime's errors share no base class
    ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf, ort.NoModel, ort.NoSuchFile,
    ort.NotImplemented, ort.RuntimeException,
)  # fmt: skip


class OnnxRuntimeEngine:
    """One session per entry of the model in `folder`, on `threads` threads; threads sleep between requests.

    A session has weights of its own. That of `extend`, which only those who keep states ask for, is opened when
    it is first asked for.
    """

    backend = "onnxruntime"

    def __init__(self, folder: Path, spec: EngineSpec, *, threads: int | None = None) -> None:
        self.precision = spec.precision
        self.config = HSTUConfig.from_pretrained(folder)
        missing = sorted(set(entry_names(self.config)) - set(spec.entries))
        if missing:
            raise ArtifactError(
                f"{folder}: engine.json lacks entries of this model", got=sorted(spec.entries), expected=missing
            )
        self._options = session_options(threads or len(os.sched_getaffinity(0)))
        self._files = {name: folder / file for name, file in spec.entries.items()}
        self._opening = threading.Lock()
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        for name in spec.entries:
            if name != "extend":
                self._session(name)
        self._outputs = {name: [o.name for o in entry(self.config, name).outputs] for name in entry_names(self.config)}

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The entry's outputs by name. Feeds must have passed `check_feeds`."""
        if entry not in self._files:
            raise InputError(f"this engine has no {entry!r} entry", expected=", ".join(self._files) or "an open engine")
        names = self._outputs[entry]
        return dict(zip(names, self._session(entry).run(names, dict(feeds)), strict=True))

    def close(self) -> None:
        """Release memory and threads; the engine must not be used after."""
        self._files.clear()
        self._sessions.clear()

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        with self._opening:
            if name not in self._sessions:
                self._sessions[name] = _open_session(self._files[name], self._options)
            return self._sessions[name]


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """The options every session of ours has: one quiet pool, deterministic kernels, no arena that only grows."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors; a session's warnings are about graphs, which the build has checked
    # A pool that spins while it waits takes the cores from the other entry's pool and from the server's threads.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _open_session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(path, options, providers=[PROVIDER])
    except _CANNOT_LOAD as error:
        raise ArtifactError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it",
            got=str(error),
            fix="run build-engine again",
        ) from None


def open_engine(folder: Path, spec: EngineSpec, *, threads: int | None = None) -> OnnxRuntimeEngine:
    """The engine of a folder, ready to run on `threads` threads (default: one per core)."""
    return OnnxRuntimeEngine(folder, spec, threads=threads)
