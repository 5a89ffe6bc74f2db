"""THE table of what goes in and out of a compiled model: names, dtypes, shapes, dynamic ranges.

Every exporter, engine, runtime and test reads it; no tensor name stands anywhere else.

Shape letters, one alphabet for the whole project:
    B users in a batch · L positions of this batch (its longest history) · N the model's constant length
    H heads · D embedding width · C candidates per user · K results per user · T tasks
    (in jagged layouts T is the total number of events and is said to be)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hstu.config import HSTUConfig
from hstu.errors import InputError

EntryName = Literal["retrieve", "rank"]
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


def num_results(config: HSTUConfig) -> int:
    """K of the retrieve entry."""
    return min(MAX_RESULTS, config.num_items)


def entry_names(config: HSTUConfig) -> tuple[EntryName, ...]:
    """The entries this model has: rank needs task heads."""
    return ("retrieve", "rank") if config.tasks else ("retrieve",)


def entry(config: HSTUConfig, name: EntryName) -> Entry:
    """Inputs and outputs of an entry, in the order the graph has them."""
    if name not in entry_names(config):
        raise InputError(f"this model has no {name!r} entry", expected=", ".join(entry_names(config)))
    history = [TensorSpec(name="item_ids", dtype="int64", shape=("B", "L"), meaning="1..num_items, 0 after the end")]
    if config.num_actions:
        history.append(
            TensorSpec(name="actions", dtype="int64", shape=("B", "L"), meaning="1..num_actions-1, 0 = none")
        )
    history += [
        TensorSpec(name="timestamps", dtype="int64", shape=("B", "L"), meaning="not falling, 0 after the end"),
        TensorSpec(name="lengths", dtype="int64", shape=("B",), meaning="events of each user, 0..L"),
        TensorSpec(name="query_time", dtype="int64", shape=("B",), meaning="when the answer is wanted, 0 = not given"),
    ]
    outputs: tuple[TensorSpec, ...]
    if name == "retrieve":
        outputs = (
            TensorSpec(name="user_embedding", dtype="float32", shape=("B", config.embedding_dim), meaning="L2 norm 1"),
            TensorSpec(name="top_item_ids", dtype="int64", shape=("B", num_results(config)), meaning="best first"),
            TensorSpec(name="top_scores", dtype="float32", shape=("B", num_results(config)), meaning="cosine"),
        )
    else:
        history.append(TensorSpec(name="candidate_ids", dtype="int64", shape=("B", "C"), meaning="1..num_items"))
        outputs = (
            TensorSpec(
                name="task_scores", dtype="float32", shape=("B", "C", len(config.tasks)), meaning="probability per task"
            ),
        )
    return Entry(name=name, inputs=tuple(history), outputs=outputs)


def dynamic_ranges(config: HSTUConfig) -> dict[str, tuple[int, int, int]]:
    """(min, typical, max) of each dynamic letter: what optimisation profiles and checks are made of."""
    return {
        "B": (1, 8, MAX_BATCH),
        "L": (1, config.max_history, config.max_history),
        "C": (1, 128, MAX_CANDIDATES),
    }
