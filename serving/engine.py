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
_LATEST = 2**63 - 1
BACKENDS = {  # backend name → module that holds `open_engine(folder, spec, *, threads) -> Engine`
    "onnxruntime": f"{__package__}.engines.onnxruntime",
    "openvino": f"{__package__}.engines.openvino",
    "tensorrt": f"{__package__}.engines.tensorrt",
    "tensorrt-rtx": f"{__package__}.engines.tensorrt",
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


def check_feeds(config: HSTUConfig, name: EntryName, feeds: Mapping[str, Array], *, finite: bool = False) -> None:
    """Every input is there with the right dtype, shape and values, or InputError says which is not.

    Ids inside a history must be 1..num_items, and after its end in the tables all the same: engines look up every
    position. Timestamps must not fall, and no time may be negative, so that differences fit int64. There is at least
    one user, and one candidate; rows of length 0 are allowed, but for `extend`. A cache must be finite up to its end;
    `finite` says that this is known (reading all of it takes time).
    """
    if name not in entry_names(config):
        raise InputError(f"this model has no {name!r} entry", expected=", ".join(entry_names(config)))
    specs = entry(config, name).inputs
    if set(feeds) != {spec.name for spec in specs}:
        raise InputError(f"{name}: wrong inputs", got=sorted(feeds), expected=sorted(spec.name for spec in specs))
    letters: dict[str, int] = {}
    for spec in specs:
        value = feeds[spec.name]
        if not isinstance(value, np.ndarray):
            raise InputError(f"{name}: input {spec.name!r} is no array", got=type(value).__name__, expected="numpy")
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
    for letter, what in (("B", "users"), ("C", "candidates")):
        if letters.get(letter) == 0:
            raise InputError(f"{name}: no {what}", got=f"{letter} = 0", expected="at least 1")
    padded, least = (letters["E"], 1) if name == "extend" else (letters["L"], 0)
    if not 1 <= padded <= config.max_history:
        raise InputError(
            f"{name}: histories of this length do not fit the model",
            got=padded,
            expected=f"1..{config.max_history}",
            fix="keep the newest events",
        )
    lengths = feeds["lengths"]
    if lengths.size and not (least <= lengths.min() and lengths.max() <= padded):
        raise InputError(f"{name}: lengths out of range", got=lengths.tolist(), expected=f"{least}..{padded}")
    inside = np.arange(padded) < lengths[:, None]
    _check_range(name, "item_ids", feeds["item_ids"], 0, config.num_items)
    _check_range(name, "item_ids", feeds["item_ids"][inside], 1, config.num_items)
    if "actions" in feeds:
        _check_range(name, "actions", feeds["actions"], 0, config.num_actions - 1)
    if "candidate_ids" in feeds:
        _check_range(name, "candidate_ids", feeds["candidate_ids"], 1, config.num_items)
    _check_times(name, "timestamps", feeds["timestamps"], inside)
    _check_range(name, "query_time", feeds["query_time"], 0, _LATEST)
    if name == "extend":
        _check_cache(config, feeds, finite=finite)


def check_answers(engine: Engine, name: EntryName, answers: Mapping[str, Array]) -> None:
    """Every float output but `cache_rows` is a number, or ArtifactError says whose is not: an item ranked by a NaN
    would be an answer that looks like any other."""
    for spec in entry(engine.config, name).outputs:
        if spec.dtype == "float32" and spec.name != "cache_rows" and not np.isfinite(answers[spec.name]).all():
            values = answers[spec.name]
            wrong = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
            raise ArtifactError(
                f"{engine.backend} {engine.precision}: {name} gave a {spec.name} that is not a number",
                got=f"NaN or infinity for rows {np.flatnonzero(wrong).tolist()}",
                fix="start users anew from their histories; if that does not help, use an engine of a wider precision",
            )


def _check_cache(config: HSTUConfig, feeds: Mapping[str, Array], *, finite: bool) -> None:
    """Cached and new events together are one history that fits the model; rows of the cache are numbers."""
    times, cached, lengths = feeds["cached_timestamps"], feeds["cached_lengths"], feeds["lengths"]
    positions = times.shape[1]
    if not 1 <= positions <= config.max_history:
        raise InputError(
            "extend: a cache of this many positions does not fit the model",
            got=positions,
            expected=f"1..{config.max_history} (of an empty cache 1, which is not read)",
        )
    if cached.size and not (0 <= cached.min() and cached.max() <= positions):
        raise InputError("extend: cached_lengths out of range", got=cached.tolist(), expected=f"0..{positions}")
    if (cached + lengths).max(initial=0) > config.max_history:
        raise InputError(
            "extend: cached and new events together do not fit the model",
            got=(cached + lengths).tolist(),
            expected=f"at most {config.max_history}",
            fix="compute the newest events anew, with cached_lengths 0: positions are absolute, so no row can move",
        )
    _check_times("extend", "cached_timestamps", times, np.arange(positions) < cached[:, None])
    some = np.flatnonzero(cached)
    before = times[some, cached[some] - 1] > feeds["timestamps"][some, 0]
    if before.any():
        raise InputError(
            "extend: new events are older than cached ones",
            got=f"in rows {some[before].tolist()}",
            fix="compute the whole history anew when events arrive late",
        )
    wrong = [] if finite else [row for row in some.tolist() if not _finite(feeds["cache"][row, :, : cached[row]])]
    if wrong:
        raise InputError(
            "extend: a cache holds what is not a number",
            got=f"NaN or infinity in rows {wrong}",
            fix="drop it and compute the history anew",
        )


def _finite(rows: Array) -> bool:
    """Whether all values of float32 [layers, P, ·] are; sums tell without a mask as large as the rows."""
    with np.errstate(over="ignore", invalid="ignore"):
        sums = [float(layer.sum(dtype=np.float32)) for layer in rows]
    return bool(np.isfinite(sums).all() or np.isfinite(rows).all())  # large finite values may overflow a sum


def _check_times(entry_name: str, name: str, times: Array, inside: Array) -> None:
    _check_range(entry_name, name, times[inside], 0, _LATEST)
    falls = (times[:, 1:] < times[:, :-1]) & inside[:, 1:]
    if falls.any():
        raise InputError(
            f"{entry_name}: timestamps fall within a history",
            got=f"in rows {np.unique(np.nonzero(falls)[0]).tolist()}",
            fix="sort each history by time, oldest first",
        )


def _check_range(entry_name: str, name: str, values: Array, low: int, high: int) -> None:
    if values.size and not (low <= values.min() and values.max() <= high):
        wrong = values[(values < low) | (values > high)]
        raise InputError(f"{entry_name}: {name} out of range", got=wrong[:5].tolist(), expected=f"{low}..{high}")
