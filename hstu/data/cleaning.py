"""Raw rows become events, or are dropped for a reason that is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hstu.data.events import EventLog, Float64s
from hstu.data.histories import Int64s
from hstu.data.readers import RawEvents
from hstu.errors import InputError

REASONS = (
    "unparsable_row",
    "missing_field",
    "bad_timestamp",
    "unknown_action",
    "bad_dwell_or_price",
    "duplicate",
    "item_with_few_events",
    "user_with_few_events",
)
_LATEST_S = 10**11  # the year 5138: beyond it a timestamp is in another unit
_EARLY_S = 10**8  # March 1973: a whole log before it was hardly in milliseconds
_INTEGER = r"^\s*\d{1,18}(\.\d*)?\s*$"
_NUMBER = r"^\s*(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?\s*$"

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class CleaningReport:
    """How many rows there were, how many were dropped for each of REASONS, and what else was put right.

    out_of_order_events: events that stood after a later one of the same user, before everything was sorted.
    """

    rows: int
    dropped: Mapping[str, int]
    out_of_order_events: int
    notes: tuple[str, ...]


def clean_events(
    raw: RawEvents,
    *,
    actions: Sequence[str],
    timestamp_unit: str,
    min_user_events: int,
    min_item_events: int,
) -> tuple[EventLog, CleaningReport]:
    """The events of `raw`, sorted by (user, time), and what became of the rest.

    A row counts under the first reason that applies. Of duplicates (same user, item, time and action) the
    first stays. Users and items with few events go in turns until all that are left have enough. Raises
    InputError when nothing is left.
    """
    table, notes = raw.table, []
    seconds, in_other_unit = _seconds(table["timestamp"], timestamp_unit)
    dwell, dwell_bad = _numbers(table["dwell"])
    price, price_bad = _numbers(table["price"])
    codes = _to_numpy(pc.index_in(table["action"], pa.array(actions, pa.string())), fill=-1) + 1
    required = ["user", "item", "timestamp"] + (["action"] if raw.has_actions else [])
    missing = np.logical_or.reduce([_blank(table[name]) for name in required])
    failures: dict[str, Bools] = {
        "missing_field": missing,
        "bad_timestamp": seconds < 1,
        "unknown_action": (codes == 0) & raw.has_actions,
        "bad_dwell_or_price": dwell_bad | price_bad,
    }
    dropped = dict.fromkeys(REASONS, 0) | {"unparsable_row": raw.unparsable}
    keep = np.ones(table.num_rows, dtype=bool)
    for reason, failed in failures.items():
        dropped[reason] = int((failed & keep).sum())
        keep &= ~failed
    if int((in_other_unit & ~missing).sum()) * 2 > table.num_rows:
        notes.append("most timestamps lie beyond the year 5138: set prepare-data.timestamp_unit to ms")
    if timestamp_unit == "ms" and keep.any() and seconds[keep].max() < _EARLY_S:
        notes.append("every event lies before 1974: are the timestamps in s, not in ms?")
    users, user_ids = _codes(table["user"].filter(pa.array(keep)))
    items, item_ids = _codes(table["item"].filter(pa.array(keep)))
    log = EventLog(
        users=users,
        items=items,
        actions=codes[keep] if raw.has_actions else np.zeros(len(users), dtype=np.int64),
        timestamps=seconds[keep],
        dwell_s=dwell[keep],
        price=price[keep],
        user_ids=user_ids,
        item_ids=item_ids,
        action_names=tuple(actions) if raw.has_actions else (),
    )
    by_user = np.argsort(log.users, kind="stable")
    falls = (np.diff(log.timestamps[by_user]) < 0) & (np.diff(log.users[by_user]) == 0)
    log = _select(log, np.lexsort((log.timestamps, log.users)))
    first = _first_of_duplicates(log)
    dropped["duplicate"] = int((~first).sum())
    log = _select(log, np.flatnonzero(first))
    log, few_items, few_users = _drop_rare(log, min_user_events, min_item_events)
    dropped |= {"item_with_few_events": few_items, "user_with_few_events": few_users}
    rows = table.num_rows + raw.unparsable
    if not len(log):
        counts = ", ".join(f"{reason} {count}" for reason, count in dropped.items() if count)
        raise InputError(
            "no events are left of the log",
            got=f"{rows} rows, dropped: {counts}",
            expected=f"users with at least {min_user_events} events",
            fix=notes[0] if notes else "look at the rows that were dropped, or change the limits of prepare-data",
        )
    report = CleaningReport(rows=rows, dropped=dropped, out_of_order_events=int(falls.sum()), notes=tuple(notes))
    return log, report


def _seconds(column: Any, unit: str) -> tuple[Int64s, Bools]:
    """int64 seconds, 0 where there is no usable time; and which ones are beyond any time in this unit."""
    if pa.types.is_timestamp(column.type):  # counts from 1970 in UTC, whatever zone it is shown in
        seconds = _to_numpy(column.cast(pa.int64()), fill=0)
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
    elif pa.types.is_date(column.type):
        seconds, per_second = _to_numpy(column.cast(pa.date64()).cast(pa.int64()), fill=0), 1000
    else:
        if pa.types.is_floating(column.type):
            usable = pc.fill_null(pc.and_(pc.is_finite(column), pc.less(pc.abs(column), 1e18)), False)
            whole = pc.floor(column)
        elif pa.types.is_integer(column.type):
            usable, whole = pc.fill_null(pc.less(column.cast(pa.float64(), safe=False), 1e18), False), column
        else:
            usable = pc.fill_null(pc.match_substring_regex(column, _INTEGER), False)
            whole = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"\.\d*$", "")
        whole = pc.if_else(usable, whole, None).cast(pa.int64())
        seconds = _to_numpy(whole, fill=0)
        per_second = 1000 if unit == "ms" else 1
    seconds = seconds // per_second
    beyond = seconds >= _LATEST_S
    return np.where(beyond, 0, seconds), beyond


def _numbers(column: Any) -> tuple[Float64s, Bools]:
    """float64, NaN where the field is missing; and which ones are there but no finite number >= 0."""
    missing = _blank(column)
    if pa.types.is_string(column.type):
        usable = pc.fill_null(pc.match_substring_regex(column, _NUMBER), False)
        column = pc.if_else(usable, pc.utf8_trim_whitespace(column), None)
    values = np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
    bad = ~missing & ~(np.isfinite(values) & (values >= 0))
    return np.where(missing | bad, np.nan, values), bad


def _blank(column: Any) -> Bools:
    """Null, NaN, or text of white space alone."""
    if pa.types.is_string(column.type):
        column = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), None, column)
    return np.asarray(pc.is_null(column, nan_is_null=True).to_numpy(), dtype=bool)


def _to_numpy(column: Any, *, fill: int) -> Int64s:
    return np.asarray(pc.fill_null(column, fill).to_numpy(), dtype=np.int64)


def _codes(column: Any) -> tuple[Int64s, tuple[str, ...]]:
    """Codes int64 and the ids they stand for, in the order of the ids as text."""
    encoded = column.combine_chunks().dictionary_encode()
    ids = np.array(encoded.dictionary.to_pylist(), dtype=object)
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    rank = np.empty(len(ids), dtype=np.int64)
    rank[order] = np.arange(len(ids))
    return rank[_to_numpy(encoded.indices, fill=0)], tuple(ids[order])


def _first_of_duplicates(log: EventLog) -> Bools:
    keys = (log.actions, log.items, log.timestamps, log.users)
    order = np.lexsort(keys)  # stable: of equal rows the first of the file comes first
    same = np.logical_and.reduce([np.diff(key[order]) == 0 for key in keys])
    first = np.ones(len(log), dtype=bool)
    first[order[1:][same]] = False
    return first


def _drop_rare(log: EventLog, min_user_events: int, min_item_events: int) -> tuple[EventLog, int, int]:
    """The log without users and items of few events, and how many events each rule took."""
    keep = np.ones(len(log), dtype=bool)
    taken = [0, 0]
    while True:
        before = int(keep.sum())
        for index, (codes, least) in enumerate(((log.items, min_item_events), (log.users, min_user_events))):
            counts = np.bincount(codes[keep], minlength=1)
            rare = keep & (counts[np.minimum(codes, len(counts) - 1)] < least)
            taken[index] += int(rare.sum())
            keep &= ~rare
        if int(keep.sum()) == before:
            return _select(log, np.flatnonzero(keep)), taken[0], taken[1]


def _select(log: EventLog, rows: Int64s) -> EventLog:
    """The events of `rows`, in that order; ids that no event is left of are forgotten."""
    used_users, users = np.unique(log.users[rows], return_inverse=True)
    used_items, items = np.unique(log.items[rows], return_inverse=True)
    return EventLog(
        users=users.astype(np.int64),
        items=items.astype(np.int64),
        actions=log.actions[rows],
        timestamps=log.timestamps[rows],
        dwell_s=log.dwell_s[rows],
        price=log.price[rows],
        user_ids=tuple(log.user_ids[code] for code in used_users),
        item_ids=tuple(log.item_ids[code] for code in used_items),
        action_names=log.action_names,
    )
