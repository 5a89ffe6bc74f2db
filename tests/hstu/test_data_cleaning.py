"""Rows become events sorted by user and time; each that does not is counted under the first reason that applies."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings

from hstu.data.cleaning import REASONS, CleaningReport, clean_events
from hstu.data.events import EventLog
from hstu.data.readers import RawEvents
from hstu.errors import InputError

ACTIONS = ("view", "like")
Row = tuple[Any, ...]


def raw_events(rows: list[Row], *, has_actions: bool = True, timestamps: pa.Array | None = None) -> RawEvents:
    """user, item, action, timestamp[, dwell[, price]] a row, as text."""
    names = ("user", "item", "action", "timestamp", "dwell", "price")
    full = [(*row, None, None)[:6] for row in rows]
    columns = {
        name: pa.array([None if row[i] is None else str(row[i]) for row in full], pa.string())
        for i, name in enumerate(names)
    }
    if timestamps is not None:
        columns["timestamp"] = timestamps
    return RawEvents(table=pa.table(columns), unparsable=0, has_actions=has_actions, has_dwell=True, has_price=True)


def clean(rows: list[Row], **changes: Any) -> tuple[EventLog, CleaningReport]:
    raw = changes.pop("raw", None) or raw_events(rows)
    limits = {"actions": ACTIONS, "timestamp_unit": "s", "min_user_events": 1, "min_item_events": 1}
    return clean_events(raw, **{**limits, **changes})


def events(log: EventLog) -> list[tuple[str, str, str, int]]:
    return [
        (log.user_ids[u], log.item_ids[i], log.action_names[a - 1] if a else "", int(t))
        for u, i, a, t in zip(log.users, log.items, log.actions, log.timestamps, strict=True)
    ]


def test_events_are_sorted_by_user_and_time_and_equal_times_keep_their_order() -> None:
    rows = [
        ("b", "x", "view", 5),
        ("a", "z", "view", 9),
        ("b", "y", "like", 2),
        ("a", "y", "like", 9),
        ("a", "x", "view", 9),
    ]
    log, report = clean(rows)
    assert events(log) == [
        ("a", "z", "view", 9),
        ("a", "y", "like", 9),
        ("a", "x", "view", 9),
        ("b", "y", "like", 2),
        ("b", "x", "view", 5),
    ]
    assert report.out_of_order_events == 1
    assert log.offsets.tolist() == [0, 3, 5]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ((None, "x", "view", 1), "missing_field"),
        ((" ", "x", "view", 1), "missing_field"),
        (("a", "", "view", 1), "missing_field"),
        (("a", "x", None, 1), "missing_field"),
        (("a", "x", "view", None), "missing_field"),
        (("a", None, "dance", "yesterday"), "missing_field"),
        (("a", "x", "view", "yesterday"), "bad_timestamp"),
        (("a", "x", "view", 0), "bad_timestamp"),
        (("a", "x", "view", -5), "bad_timestamp"),
        (("a", "x", "view", "nan"), "bad_timestamp"),
        (("a", "x", "view", "1e9"), "bad_timestamp"),
        (("a", "x", "view", 10**11), "bad_timestamp"),
        (("a", "x", "view", 10**30), "bad_timestamp"),
        (("a", "x", "View", 1), "unknown_action"),
        (("a", "x", "view", 1, -1), "bad_dwell_or_price"),
        (("a", "x", "view", 1, "long"), "bad_dwell_or_price"),
        (("a", "x", "view", 1, None, "inf"), "bad_dwell_or_price"),
        (("a", "x", "view", 1, None, "1e400"), "bad_dwell_or_price"),
    ],
)
def test_a_bad_row_is_dropped_for_its_reason(row: Row, reason: str) -> None:
    log, report = clean([("a", "good", "like", 7), row])
    assert events(log) == [("a", "good", "like", 7)]
    assert {name: count for name, count in report.dropped.items() if count} == {reason: 1}
    assert tuple(report.dropped) == REASONS
    assert report.rows == 2


def test_numbers_are_read_and_missing_ones_are_not_known() -> None:
    log, _ = clean([("a", "x", "view", " 7.9 ", "1.5", ".5"), ("a", "y", "view", "8", "", "2e1")])
    assert log.timestamps.tolist() == [7, 8]
    np.testing.assert_array_equal(log.dwell_s, [1.5, np.nan])
    np.testing.assert_array_equal(log.price, [0.5, 20.0])


def test_duplicates_go_and_the_first_of_them_stays() -> None:
    rows = [
        ("a", "x", "view", 3, 1),
        ("a", "x", "view", 3, 2),
        ("a", "x", "like", 3, 3),
        ("a", "x", "view", 4, 4),
        ("a", "x", "view", 3, 5),
    ]
    log, report = clean(rows)
    assert log.dwell_s.tolist() == [1, 3, 4]
    assert report.dropped["duplicate"] == 2


def test_users_and_items_with_few_events_go_until_all_that_are_left_have_enough() -> None:
    rows = [("a", "x", "view", 1), ("a", "x", "view", 2), ("b", "x", "view", 3), ("b", "rare", "view", 4)]
    log, report = clean(rows, min_user_events=2, min_item_events=2)
    assert events(log) == [("a", "x", "view", 1), ("a", "x", "view", 2)]  # without "rare", b has one event only
    assert (report.dropped["item_with_few_events"], report.dropped["user_with_few_events"]) == (1, 1)
    assert log.user_ids == ("a",)
    assert log.item_ids == ("x",)


def test_a_log_without_actions_has_action_none() -> None:
    log, _ = clean([], raw=raw_events([("a", "x", None, 1), ("a", "y", "what", 2)], has_actions=False))
    assert log.actions.tolist() == [0, 0]
    assert log.action_names == ()


def test_milliseconds_are_read_when_said_and_suspected_when_not() -> None:
    rows = [("a", "x", "view", 1_700_000_000_500), ("a", "y", "view", 1_700_000_001_500)]
    log, report = clean(rows, timestamp_unit="ms")
    assert log.timestamps.tolist() == [1_700_000_000, 1_700_000_001]
    assert not report.notes
    with pytest.raises(InputError, match="timestamp_unit to ms"):
        clean(rows)
    _, report = clean([("a", "x", "view", 1_700_000_000)], timestamp_unit="ms")
    assert "in s, not in ms" in report.notes[0]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([5_000, 6_999], pa.timestamp("ms")),
        pa.array([5_000_000_000, 6_999_999_999], pa.timestamp("ns", tz="Europe/Paris")),
        pa.array([5, 6], pa.uint64()),
        pa.array([5.0, 6.9], pa.float32()),
    ],
)
def test_typed_timestamps(array: pa.Array) -> None:
    log, _ = clean([], raw=raw_events([("a", "x", "view", 0), ("a", "y", "view", 0)], timestamps=array))
    assert log.timestamps.tolist() == [5, 6]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([-1.5, float("inf"), 1e30, float("nan")], pa.float64()),
        pa.array([2**64 - 1, 0, 2**63, None], pa.uint64()),
        pa.array([-1, 0, -(2**62), None], pa.timestamp("us")),
    ],
)
def test_typed_timestamps_that_are_no_time(array: pa.Array) -> None:
    rows = [("a", str(i), "view", 0) for i in range(4)]
    with pytest.raises(InputError, match="missing_field 1, bad_timestamp 3"):
        clean([], raw=raw_events(rows, timestamps=array))


def test_dates_are_midnight() -> None:
    log, _ = clean([], raw=raw_events([("a", "x", "view", 0)], timestamps=pa.array([1], pa.date32())))
    assert log.timestamps.tolist() == [86_400]


def test_nothing_left_says_why() -> None:
    with pytest.raises(InputError, match="2 rows, dropped: unknown_action 1, user_with_few_events 1"):
        clean([("a", "x", "dance", 1), ("a", "x", "view", 1)], min_user_events=2)


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", None]),
        st.sampled_from(["x", "y", "z", ""]),
        st.sampled_from(["view", "like", "dance"]),
        st.sampled_from(["-1", "1", "2", "3", "4", "soon"]),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(rows=ROWS, least=st.integers(1, 4))
def test_every_row_is_an_event_or_counted_and_the_rules_hold(rows: list[Row], least: int) -> None:
    good = {
        row for row in rows if row[0] and row[1] and row[2] in ACTIONS and row[3] in ("1", "2", "3", "4")
    }  # a set: without duplicates
    while True:  # the definition, by sets
        users, items = [row[0] for row in good], [row[1] for row in good]
        enough = {row for row in good if items.count(row[1]) >= least and users.count(row[0]) >= least}
        if enough == good:
            break
        good = enough
    try:
        log, report = clean(rows, min_user_events=least, min_item_events=least)
    except InputError:
        assert not good
        return
    assert {(u, i, a, str(t)) for u, i, a, t in events(log)} == good
    assert len(log) == len(good)
    assert report.rows == len(rows) == len(log) + sum(report.dropped.values())
    assert (np.lexsort((log.timestamps, log.users)) == np.arange(len(log))).all()
