"""OpenVINO on the CPU with the fused attention kernel: the fast engine of machines without a GPU."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino

from hstu.config import HSTUConfig
from hstu.errors import ArtifactError, InputError, MissingBackendError
from hstu.signature import EntryName, entry, entry_names
from hstu.time_buckets import THRESHOLDS
from kernels.cpu.library import LIBRARY, OPERATIONS, KernelError, Library
from kernels.cpu.load import load
from kernels.hstu_attention.cpu import time_buckets
from serving.engine import Array, EngineSpec
from serving.engines import openvino_packing
from serving.engines.openvino_graph import read_model
from serving.engines.openvino_ops import NativeOperations, Operations, PythonOperations
from serving.engines.openvino_products import PackedWeights
from serving.time_features import NAMES, time_features

_LOG = logging.getLogger(__name__)
_EDGES = np.array([0, *THRESHOLDS, 2**63 - 1], dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ports:
    """What goes in and out of a compiled model at each call, by number, and which of that are features of time."""

    inputs: tuple[tuple[int, str], ...]
    outputs: tuple[tuple[int, str], ...]
    features: frozenset[str]
    packed: frozenset[str]  # what goes in of the layout of packed rows, if they are


class OpenVinoEngine:
    """One compiled model per entry; all of them, and the attention kernel, share OpenVINO's one pool of threads.

    The layers' weights are packed once for all of them. `extend`, which only those who keep states ask for, is compiled
    when it is first asked for.
    """

    backend = "openvino"

    def __init__(self, folder: Path, spec: EngineSpec, *, threads: int | None = None) -> None:
        self.precision = spec.precision
        self.config = HSTUConfig.from_pretrained(folder)
        missing = sorted(set(entry_names(self.config)) - set(spec.entries))
        if missing:
            raise ArtifactError(
                f"{folder}: engine.json lacks entries of this model", got=sorted(spec.entries), expected=missing
            )
        self.library = _open_library(folder)
        self.operations = _open_operations(folder)
        self.weights = PackedWeights(self.library)
        self._lock = threading.RLock()  # one request uses all threads; another waits
        self.compiled: dict[str, openvino.CompiledModel] = {}
        self._requests: dict[str, openvino.InferRequest] = {}
        self._ports: dict[str, _Ports] = {}
        self._threads = threads or len(os.sched_getaffinity(0))
        self._files = {name: folder / spec.entries[name] for name in entry_names(self.config)}
        for name in entry_names(self.config):
            if name != "extend":
                self._compile(name)

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The entry's outputs by name. Feeds must have passed `check_feeds`."""
        if entry not in self._files:
            raise InputError(f"this engine has no {entry!r} entry", expected=", ".join(self._files) or "an open engine")
        with self._lock:
            if entry not in self._requests:
                self._compile(entry)
        ports = self._ports[entry]
        given = {**feeds, **time_features(self.config, feeds, ports.features, self._buckets)}
        if ports.packed:
            width, places = feeds["item_ids"].shape[1], openvino_packing.PLACES in ports.packed
            given |= openvino_packing.layout(feeds["lengths"], width, places=places)
        # A tensor is set by its number and the request asked for nothing: `infer` of a dict costs more than a layer.
        arrays = [(index, np.ascontiguousarray(given[name])) for index, name in ports.inputs]
        with self._lock:
            request = self._requests[entry]
            for index, array in arrays:
                request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
            request.infer(share_outputs=True)
            return {name: request.get_output_tensor(index).data.copy() for index, name in ports.outputs}

    def close(self) -> None:
        """Release memory and threads; the engine must not be used after."""
        self._files.clear()
        self._requests.clear()
        self._ports.clear()
        self.compiled.clear()

    def _compile(self, name: EntryName) -> None:
        model, fixed = read_model(self._files[name], self.library, self.operations, self.weights)
        compiled = openvino.Core().compile_model(model, "CPU", properties(self._threads))
        self.compiled[name], self._requests[name] = compiled, compiled.create_infer_request()
        for given, array in fixed.items():
            self._requests[name].set_tensor(given, openvino.Tensor(array))
        inputs = [(index, port.any_name) for index, port in enumerate(compiled.inputs)]
        wanted = {output.name for output in entry(self.config, name).outputs}
        self._ports[name] = _Ports(
            inputs=tuple((index, given) for index, given in inputs if given not in fixed),
            outputs=tuple((i, next(iter(wanted & port.names))) for i, port in enumerate(compiled.outputs)),
            features=frozenset(given for _, given in inputs) & frozenset(NAMES),
            packed=frozenset(given for _, given in inputs) & frozenset(openvino_packing.NAMES),
        )
        self.run(name, _one_event(self.config, name))  # weights are packed when they are first used
        _release_pages(self._files[name].parent)

    def _buckets(self, start: Array, end: Array, causal: bool) -> Array:
        return time_buckets(self.library, start, end, _EDGES, causal=causal, threaded=False)


def properties(threads: int) -> dict[str, object]:
    """What every compiled model of ours is compiled with: one stream, the types that the graph says, no guessing."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # the server decides where threads run
        "ENABLE_HYPER_THREADING": True,  # as many threads as were asked for; else a virtual machine's cores count half
        "INFERENCE_PRECISION_HINT": "f32",  # narrower types stand in the graph
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # scales that depend on the batch would make answers depend on it
    }


def _one_event(config: HSTUConfig, name: EntryName) -> dict[str, Array]:
    """The smallest request of an entry."""
    ones = {"item_ids", "lengths", "candidate_ids"}
    return {
        spec.name: np.full(
            [size if isinstance(size, int) else 1 for size in spec.shape], int(spec.name in ones), dtype=spec.dtype
        )
        for spec in entry(config, name).inputs
    }


def _release_pages(folder: Path) -> None:
    """Pages of the folder's weights leave this process's memory, and come back if they are read again.

    OpenVINO maps the weights and then packs them into memory of its own; of the mapped ones only rows of the item
    table are read later.
    """
    weights = {str(path) for path in folder.resolve().glob("*.bin")}
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in weights and fields[1].startswith("r--"):  # never written, so on disk
            start, end = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _open_library(folder: Path) -> Library:
    path = folder / LIBRARY
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: the attention kernel is missing", expected=LIBRARY, fix="run build-engine again"
        )
    try:
        return load(path)
    except KernelError as error:
        raise MissingBackendError(
            f"{path}: the attention kernel cannot be used here", got=str(error), fix="use the onnxruntime engine"
        ) from None


def _open_operations(folder: Path) -> Operations:
    """The operations compiled with the engine, or, where they are not for this OpenVINO, those written in Python."""
    try:
        return NativeOperations(folder / OPERATIONS)
    except RuntimeError as error:
        _LOG.warning(
            "%s does not go with OpenVINO %s; slower operations in Python take its place (%s)",
            folder / OPERATIONS, openvino.__version__, str(error).strip().splitlines()[-1],
        )  # fmt: skip
        return PythonOperations()


def open_engine(folder: Path, spec: EngineSpec, *, threads: int | None = None) -> OpenVinoEngine:
    """The engine of a folder, ready to run on `threads` threads (default: one per core)."""
    return OpenVinoEngine(folder, spec, threads=threads)
