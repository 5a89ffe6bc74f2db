"""One interface for everything that runs a compiled model, and the one way to open it.

An engine folder (the artifact of build-engine, or `engines/<name>/` in a bundle) holds `engine.json`
(see `EngineSpec`), `config.json` (the model's shape) and whatever files the backend needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hstu.config import HSTUConfig
from hstu.errors import ArtifactError, InputError
from hstu.signature import EntryName, entry, entry_names

Array = npt.NDArray[Any]
BACKENDS = {  # backend name → module that holds `open_engine(folder, spec, *, threads) -> Engine`
    "onnxruntime": "serving.engines.onnxruntime",
    "openvino": "serving.engines.openvino",
    "tensorrt": "serving.engines.tensorrt",
    "tensorrt-rtx": "serving.engines.tensorrt",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """What `engine.json` says: which backend runs these files, at what precision, one model file per entry."""

    backend: str
    precision: str
    entries: Mapping[str, str]  # entry name → file name in the folder
    executed: bool  # False: built and never run on this machine (no such device here)


class Engine(Protocol):
    """Runs the entries of one model. Inputs and outputs are those of `hstu.signature`, on the host."""

    @property
    def backend(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def config(self) -> HSTUConfig: ...

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The entry's outputs by name. Feeds must have passed `check_feeds`."""

    def close(self) -> None:
        """Release memory and threads; the engine must not be used after."""


def open_engine(folder: Path, *, threads: int | None = None) -> Engine:
    """The engine of a folder, ready to run, on `threads` threads (default: all cores).

    Raises ArtifactError when the folder is not an engine's, MissingBackendError when its backend is not here.
    """
    spec = read_spec(folder)
    if spec.backend not in BACKENDS:
        raise ArtifactError(
            f"{folder}: no runtime for backend {spec.backend!r}",
            expected=", ".join(BACKENDS),
            fix="rebuild it with build-engine --backend onnxruntime",
        )
    return import_module(BACKENDS[spec.backend]).open_engine(folder, spec, threads=threads)  # type: ignore[no-any-return]


def read_spec(folder: Path) -> EngineSpec:
    """`engine.json` of an engine folder; ArtifactError when it is not one."""
    try:
        values = json.loads((folder / "engine.json").read_text())
        return EngineSpec(**values)
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{folder}: not an engine ({error})", fix="run build-engine again") from None


def check_feeds(config: HSTUConfig, name: EntryName, feeds: Mapping[str, Array]) -> None:
    """Every input is there with the right dtype, shape and values, or InputError says which is not.

    Ids inside a history must be 1..num_items and timestamps must not fall; rows of length 0 are allowed.
    """
    if name not in entry_names(config):
        raise InputError(f"this model has no {name!r} entry", expected=", ".join(entry_names(config)))
    specs = entry(config, name).inputs
    if set(feeds) != {spec.name for spec in specs}:
        raise InputError(f"{name}: wrong inputs", got=sorted(feeds), expected=sorted(spec.name for spec in specs))
    letters: dict[str, int] = {}
    for spec in specs:
        value = feeds[spec.name]
        if value.dtype != np.dtype(spec.dtype) or value.ndim != len(spec.shape):
            raise InputError(
                f"{name}: input {spec.name!r} has the wrong type",
                got=f"{value.dtype} of {value.ndim} dimensions",
                expected=f"{spec.dtype} {list(spec.shape)}",
            )
        for letter, size in zip(spec.shape, value.shape, strict=True):
            if size != (letters.setdefault(letter, size) if isinstance(letter, str) else letter):
                raise InputError(
                    f"{name}: input {spec.name!r} has the wrong shape", got=list(value.shape), expected=list(spec.shape)
                )
    if not 1 <= letters["L"] <= config.max_history:
        raise InputError(
            f"{name}: histories of this length do not fit the model",
            got=letters["L"],
            expected=f"1..{config.max_history}",
            fix="keep the newest events",
        )
    lengths = feeds["lengths"]
    if lengths.size and not (0 <= lengths.min() and lengths.max() <= letters["L"]):
        raise InputError(f"{name}: lengths out of range", got=lengths.tolist(), expected=f"0..{letters['L']}")
    inside = np.arange(letters["L"]) < lengths[:, None]
    _check_range(name, "item_ids", feeds["item_ids"][inside], 1, config.num_items)
    if "actions" in feeds:
        _check_range(name, "actions", feeds["actions"][inside], 0, config.num_actions - 1)
    if "candidate_ids" in feeds:
        _check_range(name, "candidate_ids", feeds["candidate_ids"], 1, config.num_items)
    falls = (np.diff(feeds["timestamps"], axis=1) < 0) & inside[:, 1:]
    if falls.any():
        raise InputError(
            f"{name}: timestamps fall within a history",
            got=f"in rows {np.unique(np.nonzero(falls)[0]).tolist()}",
            fix="sort each history by time, oldest first",
        )


def _check_range(entry_name: str, name: str, values: Array, low: int, high: int) -> None:
    if values.size and not (low <= values.min() and values.max() <= high):
        wrong = values[(values < low) | (values > high)]
        raise InputError(f"{entry_name}: {name} out of range", got=wrong[:5].tolist(), expected=f"{low}..{high}")
