"""Holds two runtimes of one entry against each other on random histories, before anything is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.errors import GateError
from hstu.signature import EntryName, cache_spec
from hstu.tolerances import TOLERANCES
from serving.engine import Array
from serving.engines.onnxruntime import PROVIDER, session_options

RunEntry = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Inputs of an entry and what it must answer."""

    feeds: Mapping[str, Array]
    expected: Mapping[str, Array]


def random_feeds(
    config: HSTUConfig,
    name: EntryName,
    lengths: list[int],
    *,
    num_candidates: int = 1,
    seed: int = 0,
    run: RunEntry | None = None,
) -> dict[str, Array]:
    """Valid inputs of an entry: random items and actions, times from seconds to years apart, some at once.

    Every third user comes without a query time. For `extend` some of each history is cached, of the first user
    nothing; the rows are those that `run`, the entry of some runtime, gives, or random ones; NaN after their end.
    """
    rng = np.random.default_rng(seed)
    total, num_users = sum(lengths), len(lengths)
    gaps = np.exp(rng.uniform(0.0, 16.0, size=total)).astype(np.int64) * (rng.random(total) > 0.1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    timestamps = 1_000_000_000 + np.cumsum(gaps)
    last = timestamps[np.maximum(offsets[1:] - 1, 0)] if total else np.full(num_users, 1_000_000_000)
    asked = np.arange(num_users) % 3 != 2
    histories = Histories(
        item_ids=rng.integers(1, config.num_items + 1, size=total),
        actions=rng.integers(0, max(1, config.num_actions), size=total),
        timestamps=timestamps,
        offsets=offsets,
        query_time=np.where(asked, last + rng.integers(0, 1_000_000, size=num_users), 0),
        target_item=np.zeros(num_users, dtype=np.int64),
        target_outcomes=np.full((num_users, len(config.tasks)), -1, dtype=np.int8),
    )
    feeds: dict[str, Array] = dict(histories.feeds(config))
    if name == "rank":
        feeds["candidate_ids"] = rng.integers(1, config.num_items + 1, size=(num_users, num_candidates))
    if name == "extend":
        cached = rng.integers(0, np.array(lengths))
        cached[:1] = 0
        whole, feeds = feeds, split_feeds(feeds, cached)
        shape = num_users, *cache_spec(config).shape(feeds["cached_timestamps"].shape[1])
        rows = rng.normal(0.0, 0.5, size=shape) if run is None else cache_from(whole, shape, run)
        after = np.arange(rows.shape[2]) >= cached[:, None]
        feeds["cache"] = np.where(after[:, None, :, None], np.nan, rows).astype(np.float32)
    return feeds


def cache_from(feeds: Mapping[str, Array], shape: tuple[int, ...], run: RunEntry) -> Array:
    """float32 [B, layers, P, ·]: the rows that `run` gives of the first P events of histories, inputs of `retrieve`."""
    everything = split_feeds(feeds, np.zeros_like(feeds["lengths"]))
    nothing = np.full((shape[0], shape[1], 1, shape[3]), np.nan, np.float32)
    rows: Array = run(everything | {"cache": nothing})["cache_rows"]
    return rows[:, :, : shape[2]]


def split_feeds(feeds: Mapping[str, Array], cached: Array) -> dict[str, Array]:
    """Inputs of `retrieve` as those of `extend`, the cache apart: the first `cached` int64 [B] events are in it."""

    def part(values: Array, start: Array, stop: Array) -> Array:
        width = max(1, int((stop - start).max(initial=0)))
        index = start[:, None] + np.arange(width)
        taken = np.take_along_axis(values, np.minimum(index, values.shape[1] - 1), axis=1)
        return np.where(index < stop[:, None], taken, 0)

    lengths, none = feeds["lengths"], np.zeros_like(cached)
    new = {key: part(value, cached, lengths) for key, value in feeds.items() if value.ndim == 2}
    times = {"cached_timestamps": part(feeds["timestamps"], none, cached), "cached_lengths": cached}
    return {**new, "lengths": lengths - cached, "query_time": feeds["query_time"], **times}


def check_batches(
    config: HSTUConfig, name: EntryName, *, seed: int, run: RunEntry | None = None
) -> Iterator[dict[str, Array]]:
    """Batches that reach every corner of the dynamic shapes: one event alone, mixed lengths with an empty history,
    the longest history there may be; for `extend` nothing cached, mixed, all new beside much cached (by `run`)."""
    longest = config.max_history
    middle = min(longest, 48)
    if name == "extend":
        for row, lengths in enumerate(([1], [2, middle, 1, middle // 2, min(longest, 7)], [longest, longest])):
            yield random_feeds(config, name, [max(1, length) for length in lengths], seed=seed + row, run=run)
        return
    yield random_feeds(config, name, [1], num_candidates=1, seed=seed)
    yield random_feeds(config, name, [middle, 1, middle // 2, 0, min(longest, 7)], num_candidates=17, seed=seed + 1)
    yield random_feeds(config, name, [longest, max(1, longest // 3)], num_candidates=3, seed=seed + 2)


def worst_error(expected: Mapping[str, Array], got: Mapping[str, Array]) -> float:
    """The largest difference of any output; a NaN counts as infinity.

    It is absolute for outputs of unit size, which all answers are, and relative to the largest value of an output
    that exceeds one: rows of a cache reach 5 in a model of twelve layers, and what rounding leaves of them grows with
    them. The items of the top K may differ where scores tie: an item in one list alone is wrong by as much as its
    score stands above the other list's last.
    """
    worst = 0.0
    for name, values in expected.items():
        if name == "top_item_ids":
            worst = max(worst, _topk_error(values, expected["top_scores"], got[name], got["top_scores"]))
        elif values.size:
            difference = np.abs(values - got[name]).max() / max(1.0, np.abs(values).max())
            worst = max(worst, float(difference) if np.isfinite(difference) else float("inf"))
    return worst


def _topk_error(expected_ids: Array, expected_scores: Array, ids: Array, scores: Array) -> float:
    worst = 0.0
    for row in range(len(expected_ids)):
        left = dict(zip(expected_ids[row].tolist(), expected_scores[row].tolist(), strict=True))
        right = dict(zip(ids[row].tolist(), scores[row].tolist(), strict=True))
        if len(right) != len(ids[row]):
            return float("inf")  # an item twice
        for item in left.keys() | right.keys():
            worst = max(worst, abs(left.get(item, min(left.values())) - right.get(item, min(right.values()))))
    return worst


def onnxruntime_entry(path: Path) -> RunEntry:
    """Runs an .onnx file on ONNX Runtime's CPU provider, on all cores."""
    session = onnxruntime.InferenceSession(path, session_options(threads=0), providers=[PROVIDER])
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return run


def run_cases(config: HSTUConfig, name: EntryName, run: RunEntry, *, seed: int) -> list[Case]:
    """The check batches with the answers of a runtime that is trusted."""
    return [Case(feeds=feeds, expected=run(feeds)) for feeds in check_batches(config, name, seed=seed)]


def require_equal(name: EntryName, cases: Sequence[Case], run: RunEntry, *, what: str, fix: str) -> float:
    """The worst error over the cases; GateError with the figures when it exceeds the fp32 tolerance."""
    limit = TOLERANCES["fp32"].max_abs_error
    worst = 0.0
    for case in cases:
        error = worst_error(case.expected, run(case.feeds))
        worst = max(worst, error)
        if not error <= limit:
            raise GateError(
                f"{what}: entry {name!r} does not give the same answer",
                got=f"max abs error {error:.3g} on histories of {case.feeds['lengths'].tolist()} events",
                expected=f"at most {limit:g}",
                fix=fix,
            )
    return worst
