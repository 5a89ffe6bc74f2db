"""What a foreign checkpoint is calibrated and judged on: a log in another vocabulary, or drawn histories."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from hstu.config import TASKS, HSTUConfig
from hstu.data.histories import Histories, Int64s
from hstu.data.vocabulary import Vocabulary
from hstu.errors import InputError

_START_S = 1_577_836_800  # 2020-01-01; drawn users appear within the three years after
_YEAR_S = 31_536_000
_PAUSE_S = 60.0  # median time between two events of a session
_ABSENCE_S = 86_400.0  # median time between two sessions
_SESSION_ENDS = 0.2  # probability that the next event belongs to another session
_REPEATS = 0.15  # probability that an item is one the user already had


def drawn_histories(config: HSTUConfig, *, count: int, seed: int, lengths: Int64s | None = None) -> Histories:
    """Histories of a model's own items, the same for the same arguments; no targets are known.

    Item popularity falls as 1/rank (Zipf), with a random item at each rank; times are seconds, events minutes
    apart in a session and days apart between sessions; every history has a query time. Unless `lengths` int64
    [count] are given, every length from 1 to max_history is as likely, and the longest and the shortest are
    among them.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    if lengths is None:
        lengths = np.concatenate([[config.max_history, 1], rng.integers(1, config.max_history + 1, count)])[:count]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    item_at_rank = rng.permutation(config.num_items) + 1
    popularity = np.cumsum(1.0 / np.arange(1, config.num_items + 1))
    ranks = np.searchsorted(popularity, rng.random(offsets[-1]) * popularity[-1], side="right")
    item_ids = item_at_rank[np.minimum(ranks, config.num_items - 1)].astype(np.int64)
    own = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)  # events before each one in its history
    earlier = np.arange(offsets[-1]) - (1 + rng.random(offsets[-1]) * own).astype(np.int64)
    for event in np.flatnonzero((rng.random(offsets[-1]) < _REPEATS) & (own > 0)):
        item_ids[event] = item_ids[earlier[event]]
    timestamps = np.empty(offsets[-1], dtype=np.int64)
    query_time = np.empty(count, dtype=np.int64)
    for row, (start, end) in enumerate(itertools.pairwise(offsets)):
        median = np.where(rng.random(end - start + 1) < _SESSION_ENDS, _ABSENCE_S, _PAUSE_S)
        times = rng.integers(_START_S, _START_S + 3 * _YEAR_S) + np.cumsum(
            (median * rng.lognormal(0.0, 1.0, end - start + 1)).astype(np.int64)
        )
        timestamps[start:end], query_time[row] = times[:-1], times[-1]
    actions = (
        rng.integers(min(1, config.num_actions - 1), config.num_actions, offsets[-1]) if config.num_actions else None
    )
    return Histories(
        item_ids=item_ids,
        actions=np.zeros(offsets[-1], dtype=np.int64) if actions is None else actions,
        timestamps=timestamps,
        offsets=offsets,
        query_time=query_time,
        target_item=np.zeros(count, dtype=np.int64),
        target_outcomes=np.full((count, len(config.tasks)), -1, dtype=np.int8),
    )


def translated_histories(
    histories: Histories, config: HSTUConfig, *, known_as: Vocabulary, vocabulary: Vocabulary
) -> Histories:
    """Histories whose ids are those of `known_as`, in the ids of `vocabulary`.

    Actions that the model does not know become none (0). Raises InputError naming items that it does not know.
    """
    ids = np.zeros(known_as.num_items + 1, dtype=np.int64)
    used = np.unique(np.concatenate([histories.item_ids, histories.target_item]))
    used = used[used > 0]
    raw = [known_as.item(int(item)) for item in used]
    ids[used] = vocabulary.encode_items(raw)
    unknown = [name for name, item in zip(raw, used, strict=True) if ids[item] == 0]
    if unknown:
        wanted = f"the integers 1..{vocabulary.raw_items}" if vocabulary.raw_items else "items of its vocabulary.json"
        raise InputError(
            f"the event log has items that the checkpoint does not know: {len(unknown)} of {len(used)}",
            got=", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else ""),
            expected=wanted,
            fix="bring the log the checkpoint was trained on, or set checkpoint.event_log to none",
        )
    actions = np.concatenate([[0], vocabulary.encode_actions(known_as.actions)])
    if not config.num_actions:
        actions = np.zeros_like(actions)
    return replace(
        histories,
        item_ids=ids[histories.item_ids],
        actions=actions[histories.actions],
        target_item=ids[histories.target_item],
    )


def spread_rows(histories: Histories, count: int) -> Int64s:
    """The rows of `count` histories with events, evenly spread over all of them; fewer when there are fewer."""
    rows = np.flatnonzero(histories.lengths > 0)
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def with_tasks(histories: Histories, tasks: tuple[str, ...]) -> Histories:
    """A log's histories with the outcomes of a model's tasks, -1 (not known) for a task that the log does not have."""
    columns = [
        histories.target_outcomes[:, TASKS.index(task)] if task in TASKS else np.full(len(histories), -1, dtype=np.int8)
        for task in tasks
    ]
    outcomes = np.stack(columns, axis=1) if columns else np.zeros((len(histories), 0), dtype=np.int8)
    return replace(histories, target_outcomes=outcomes)
