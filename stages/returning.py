"""Histories as returning users live them: most of it on a first visit, the newest events on the next.

The answers of the second visit must be those of `retrieve` on the whole history, so they are held against the same
figures, and nothing needs to be stored for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hstu.data.histories import Histories, Int64s, histories_from_rows
from hstu.signature import CacheForm
from serving.cache_rows import CacheRows
from serving.engine import Array, Engine
from serving.user_state import Answers, Origin, StatefulEngine, UserState, extend, start

NEW_EVENTS = 10
CACHE_FORMS: tuple[CacheForm, ...] = ("fp32", "bf16", "int8")


def returning_answers(engine: Engine, histories: Histories) -> Answers:
    """user_embedding, top_item_ids and top_scores of users who come back with their newest events.

    The first visit has the rest, but at least one event; every history must have one.
    """
    return answers_by_form(engine, histories, ("fp32",))["fp32"]


def answers_by_form(
    engine: Engine, histories: Histories, forms: Sequence[CacheForm] = CACHE_FORMS
) -> dict[CacheForm, Answers]:
    """The same, with the users' caches kept in each of the forms in between."""
    origin = Origin(checkpoint="", engine=engine.backend, precision=engine.precision)
    stateful = StatefulEngine(engine=engine, origin=origin)
    seen = seen_before(histories)
    states, _ = start(stateful, part(histories, np.zeros_like(seen), seen))
    new = part(histories, seen, histories.lengths)
    return {form: extend(stateful, [_kept_as(form, state) for state in states], new)[1] for form in forms}


def _kept_as(form: CacheForm, state: UserState) -> UserState:
    """The state with its rows in another form."""
    rows = np.zeros(state.rows.spec.shape(state.rows.length), np.float32)
    state.rows.read(rows)
    return replace(state, rows=CacheRows(state.rows.spec, form).append(rows))


def seen_before(histories: Histories, new_events: int = NEW_EVENTS) -> Int64s:
    """How many events of each history an earlier visit had: all but the newest, but at least one. int64 [B]."""
    return np.maximum(histories.lengths - new_events, 1)


def part(histories: Histories, first: Int64s, last: Int64s) -> Histories:
    """Events first..last-1 (int64 [B]) of every history, with its query time."""
    rows = []
    for row, offset in enumerate(histories.offsets[:-1]):
        events = slice(offset + first[row], offset + last[row])
        arrays = {name: getattr(histories, name)[events] for name in ("item_ids", "actions", "timestamps")}
        rows.append({**arrays, "query_time": histories.query_time[row : row + 1]})
    return histories_from_rows(rows)


def histories_from_feeds(feeds: Mapping[str, Array]) -> Histories:
    """The histories that inputs of `retrieve` hold."""
    rows: list[dict[str, Any]] = []
    for row, length in enumerate(feeds["lengths"]):
        events = {name: feeds[name][row, :length] for name in ("item_ids", "timestamps")}
        if "actions" in feeds:
            events["actions"] = feeds["actions"][row, :length]
        rows.append({**events, "query_time": feeds["query_time"][row : row + 1]})
    return histories_from_rows(rows)
