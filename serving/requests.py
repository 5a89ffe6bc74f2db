"""Requests and answers as JSON lines: read, checked, and turned into histories the model understands.

In:  {"user_id", "events": [{"item_id", "timestamp", "action"?}], "query_timestamp"?}   one object a line
Out: {"user_id", "items": [{"item_id", "score"}], "runtime", "precision"}               in the same order
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hstu.config import HSTUConfig
from hstu.data.histories import Histories, histories_from_rows
from hstu.data.vocabulary import Vocabulary
from hstu.errors import InputError

_INT64_MAX = 2**63 - 1
_REQUEST_KEYS = {"user_id", "events", "query_timestamp"}
_EVENT_KEYS = {"item_id", "timestamp", "action", "dwell", "price"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One user's history, oldest event first; query_timestamp None = not given."""

    user_id: str | int
    item_ids: Sequence[str | int]
    timestamps: Sequence[int]
    actions: Sequence[str | None]
    query_timestamp: int | None = None


def read_requests(lines: Iterable[str], *, source: str) -> list[Request]:
    """Every request of a JSON-lines stream, checked; InputError names the first line that is wrong.

    Blank lines are passed over. A stream with no request at all is an error.
    """
    requests = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{source}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: not JSON ({error})", got=line.strip()[:80]) from None
            requests.append(request_from_json(value, where=where))
    if not requests:
        raise InputError(
            f"{source}: no requests",
            expected='one object a line: {"user_id": …, "events": [{"item_id": …, "timestamp": …}]}',
        )
    return requests


def request_from_json(value: Any, *, where: str) -> Request:
    """The request that a JSON value holds; InputError says what is wrong with it and where."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a request", got=type(value).__name__, expected="an object")
    unknown = sorted(set(value) - _REQUEST_KEYS)
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}", expected=", ".join(sorted(_REQUEST_KEYS)))
    user_id = value.get("user_id")
    if not isinstance(user_id, (str, int)) or isinstance(user_id, bool):
        raise InputError(f"{where}: user_id is missing or no string or number", got=repr(user_id))
    events = value.get("events")
    if not isinstance(events, list):
        raise InputError(f"{where}: events is missing or no list", got=type(events).__name__)
    if not events:
        raise InputError(
            f"{where}: user {user_id!r} has no events",
            expected="at least one event",
            fix="leave the user out, or recommend popular items to users without a history",
        )
    items: list[str | int] = []
    timestamps: list[int] = []
    actions: list[str | None] = []
    for index, event in enumerate(events):
        at = f"{where}, events[{index}]"
        if not isinstance(event, dict):
            raise InputError(f"{at}: not an event", got=type(event).__name__, expected="an object")
        stray = sorted(set(event) - _EVENT_KEYS)
        if stray:
            raise InputError(f"{at}: unknown key {stray[0]!r}", expected=", ".join(sorted(_EVENT_KEYS)))
        item = event.get("item_id")
        if not isinstance(item, (str, int)) or isinstance(item, bool):
            raise InputError(f"{at}: item_id is missing or no string or number", got=repr(item))
        action = event.get("action")
        if action is not None and not isinstance(action, str):
            raise InputError(f"{at}: action is no string", got=repr(action))
        items.append(item)
        timestamps.append(_timestamp(event.get("timestamp"), f"{at}: timestamp"))
        actions.append(action)
        if index and timestamps[-1] < timestamps[-2]:
            raise InputError(
                f"{at}: timestamps fall",
                got=f"{timestamps[-1]} after {timestamps[-2]}",
                fix="sort the events by time, oldest first (equal times are allowed)",
            )
    query = value.get("query_timestamp")
    return Request(
        user_id=user_id,
        item_ids=items,
        timestamps=timestamps,
        actions=actions,
        query_timestamp=None if query is None else _timestamp(query, f"{where}: query_timestamp"),
    )


def _timestamp(value: Any, what: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _INT64_MAX:
        raise InputError(f"{what} is missing or no whole number of seconds", got=repr(value), expected="0..2^63-1")
    return value


def encode_requests(
    requests: Sequence[Request], config: HSTUConfig, vocabulary: Vocabulary, *, max_events: int
) -> tuple[Histories, dict[str, int]]:
    """Histories in model ids, each cut to its newest `max_events`, and how many events each cut user lost.

    InputError when an item or an action is not in the vocabulary.
    """
    rows: list[Mapping[str, Any]] = []
    cut: dict[str, int] = {}
    for request in requests:
        dropped = max(0, len(request.item_ids) - max_events)
        if dropped:
            cut[str(request.user_id)] = dropped
        rows.append(
            {
                "item_ids": [_encode_item(vocabulary, item, request) for item in request.item_ids[dropped:]],
                "timestamps": request.timestamps[dropped:],
                "actions": [_encode_action(vocabulary, a, request) for a in request.actions[dropped:]],
                "query_time": None if request.query_timestamp is None else [request.query_timestamp],
            }
        )
    return histories_from_rows(rows, num_tasks=len(config.tasks)), cut


def _encode_item(vocabulary: Vocabulary, item: str | int, request: Request) -> int:
    encoded = vocabulary.encode_item(item)
    if encoded == 0:
        raw = vocabulary.raw_items
        raise InputError(
            f"user {request.user_id!r}: unknown item {item!r}",
            expected=f"1..{raw}" if raw else f"one of the {vocabulary.num_items} items of vocabulary.json",
            fix="leave out items the model was not trained on",
        )
    return encoded


def _encode_action(vocabulary: Vocabulary, action: str | None, request: Request) -> int:
    if action is None or not vocabulary.actions:
        return 0
    if action not in vocabulary.actions:
        raise InputError(f"user {request.user_id!r}: unknown action {action!r}", expected=", ".join(vocabulary.actions))
    return vocabulary.actions.index(action) + 1
