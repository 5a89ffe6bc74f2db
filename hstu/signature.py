"""THE table of what goes in and out of a compiled model: names, dtypes, shapes, dynamic ranges.

Every exporter, engine, runtime and test reads it; no tensor name stands anywhere else.

Shape letters, one alphabet for the whole project:
    B users in a batch · L positions of this batch (its longest history) · N the model's constant length
    H heads · D embedding width · C candidates per user · K results per user · T tasks
    E new events of this batch (of its busiest user) · P positions of its cache (of its longest cached history)
    (in jagged layouts T is the total number of events and is said to be)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hstu.config import HSTUConfig
from hstu.errors import InputError

EntryName = Literal["retrieve", "rank", "extend"]
CacheForm = Literal["fp32", "bf16", "int8"]  # how a user's cache is kept between visits
ProfileName = Literal["single", "batch", "long", "all"]
MAX_RESULTS = 100  # K is min(MAX_RESULTS, num_items): callers slice
MAX_BATCH = 64
MAX_CANDIDATES = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor: `shape` holds numbers and the letters above; `meaning` says what a value is."""

    name: str
    dtype: Literal["int64", "float32"]
    shape: tuple[int | str, ...]
    meaning: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry point of a compiled model."""

    name: EntryName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """What is kept of a user between visits: THE layout of the cache, one row for each layer and event.

    A cache is [layers, P, width]. The row of layer l at position p is what that layer's attention reads of event p
    of the user's history (oldest first, positions absolute): k of all heads, then v of all heads, after SiLU. Only
    events that have a successor have rows: a row depends on the time of what follows. Forms, all row by row:

        fp32   float32 as the engine gives and takes it
        bf16   rounded to nearest even, the upper 16 bits of the float32
        int8   round(x / scale), |.| <= 127, with one float32 scale for the row's k and one for its v
    """

    num_layers: int
    k_width: int  # H·dqk
    v_width: int  # H·dv
    max_positions: int  # the last event a history may have has no successor, so no row

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self.k_width + self.v_width

    def shape(self, positions: int) -> tuple[int, int, int]:
        """The shape of one user's rows."""
        return self.num_layers, positions, self.width

    def bytes_per_user(self, form: CacheForm, positions: int) -> int:
        """Bytes of one user's rows in a form, scales included."""
        row = {"fp32": 4 * self.width, "bf16": 2 * self.width, "int8": self.width + 2 * 4}[form]
        return self.num_layers * positions * row


def cache_spec(config: HSTUConfig) -> CacheSpec:
    """The cache of this model."""
    return CacheSpec(
        num_layers=config.num_layers,
        k_width=config.num_heads * config.qk_dim,
        v_width=config.num_heads * config.v_dim,
        max_positions=config.max_history - 1,
    )


def num_results(config: HSTUConfig) -> int:
    """K of the retrieve entry."""
    return min(MAX_RESULTS, config.num_items)


def entry_names(config: HSTUConfig) -> tuple[EntryName, ...]:
    """The entries this model has: rank needs task heads."""
    return ("retrieve", "rank", "extend") if config.tasks else ("retrieve", "extend")


def entry(config: HSTUConfig, name: EntryName) -> Entry:
    """Inputs and outputs of an entry, in the order the graph has them."""
    if name not in entry_names(config):
        raise InputError(f"this model has no {name!r} entry", expected=", ".join(entry_names(config)))
    if name == "extend":
        inputs, outputs = (*_events(config, "E"), *_cache(config)), (*_results(config), _cache_rows(config))
    elif name == "rank":
        candidates = TensorSpec(name="candidate_ids", dtype="int64", shape=("B", "C"), meaning="1..num_items")
        scores = TensorSpec(
            name="task_scores", dtype="float32", shape=("B", "C", len(config.tasks)), meaning="probability per task"
        )
        inputs, outputs = (*_events(config, "L"), candidates), (scores,)
    else:
        inputs, outputs = _events(config, "L"), _results(config)
    return Entry(name=name, inputs=inputs, outputs=outputs)


def _events(config: HSTUConfig, letter: Literal["L", "E"]) -> tuple[TensorSpec, ...]:
    """A history; or, with E, what is new of it: the last event that the cache has no row of, and all after it."""
    shape, least = ("B", letter), 0 if letter == "L" else 1
    actions = TensorSpec(name="actions", dtype="int64", shape=shape, meaning="1..num_actions-1, 0 = none")
    return (
        TensorSpec(name="item_ids", dtype="int64", shape=shape, meaning="1..num_items, 0 after the end"),
        *([actions] if config.num_actions else []),
        TensorSpec(name="timestamps", dtype="int64", shape=shape, meaning="not falling, 0 after the end"),
        TensorSpec(name="lengths", dtype="int64", shape=("B",), meaning=f"events of each user, {least}..{letter}"),
        TensorSpec(name="query_time", dtype="int64", shape=("B",), meaning="when the answer is wanted, 0 = not given"),
    )


def _cache(config: HSTUConfig) -> tuple[TensorSpec, ...]:
    """Rows of the events before; what stands after the end of each is never read."""
    layers, _, width = cache_spec(config).shape(0)
    return (
        TensorSpec(name="cache", dtype="float32", shape=("B", layers, "P", width), meaning="rows as in CacheSpec"),
        TensorSpec(name="cached_timestamps", dtype="int64", shape=("B", "P"), meaning="not falling"),
        TensorSpec(name="cached_lengths", dtype="int64", shape=("B",), meaning="cached events of each user, 0..P"),
    )


def _results(config: HSTUConfig) -> tuple[TensorSpec, ...]:
    results = num_results(config)
    return (
        TensorSpec(name="user_embedding", dtype="float32", shape=("B", config.embedding_dim), meaning="L2 norm 1"),
        TensorSpec(name="top_item_ids", dtype="int64", shape=("B", results), meaning="best first"),
        TensorSpec(name="top_scores", dtype="float32", shape=("B", results), meaning="cosine"),
    )


def _cache_rows(config: HSTUConfig) -> TensorSpec:
    layers, _, width = cache_spec(config).shape(0)
    return TensorSpec(
        name="cache_rows",
        dtype="float32",
        shape=("B", layers, "E", width),
        meaning="rows of the new events; all but the last of a user may be kept",
    )


def dynamic_ranges(config: HSTUConfig) -> dict[str, tuple[int, int, int]]:
    """(min, typical, max) of each dynamic letter: what optimisation profiles and checks are made of."""
    return {
        "B": (1, 8, MAX_BATCH),
        "L": (1, config.max_history, config.max_history),
        "C": (1, 128, MAX_CANDIDATES),
        "E": (1, min(16, config.max_history), config.max_history),
        "P": (1, config.max_history, config.max_history),  # an empty cache is one row that is never read
    }


def profile_ranges(config: HSTUConfig, name: ProfileName) -> dict[str, tuple[int, int, int]]:
    """(min, typical, max) of each dynamic letter in one optimisation profile of an engine.

    single: fastest for one user, any history · batch: many users, histories up to half of what the model takes ·
    long: many users, longer histories · all: every shape. batch and long together hold every shape; single is speed.
    """
    ranges = dynamic_ranges(config)
    longest = config.max_history
    half = max(1, longest // 2)
    if name == "single":
        return {**ranges, "B": (1, 1, 2)}  # not 1 to 1: TensorRT-RTX 1.7 fails on a batch that is a constant
    if name == "batch":
        return {**ranges, "L": (1, half, half), "P": (1, half, half)}
    if name == "long":
        above = min(half + 1, longest)
        return {**ranges, "L": (above, longest, longest), "P": (above, longest, longest)}
    return ranges


def profile_shapes(
    config: HSTUConfig, name: EntryName, profile: ProfileName
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """The (min, typical, max) shape of every input of an entry in an optimisation profile."""
    ranges = profile_ranges(config, profile)

    def shape(spec: TensorSpec, which: int) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else ranges[size][which] for size in spec.shape)

    return {spec.name: (shape(spec, 0), shape(spec, 1), shape(spec, 2)) for spec in entry(config, name).inputs}
