"""Known users: the log of their events, and their states in the cache, which must agree with it.

The log is the truth. A state is used only when the events it was computed from are still what the log says; what
came after them is new. An event that arrives late (older than the last one) is put in its place in the log, and the
state no longer agrees: it is computed anew. So is one of another bundle or engine, which its origin tells.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from hstu.data.histories import Histories, Int64s, histories_from_rows
from hstu.errors import InputError
from serving.cache import Codec
from serving.user_state import UserState, from_bytes, to_bytes

RawEvent = tuple[str | int, int, str | None]  # item, timestamp, action, as the log had them
_RECORD_BYTES = 2048  # of a state beside its rows and events: objects, header, digest


class UnknownUserError(InputError):
    """No events of this user are known."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EventRows:
    """Events of one user in model ids, oldest first; int64 [n] each."""

    item_ids: Int64s
    actions: Int64s
    timestamps: Int64s

    def __len__(self) -> int:
        return len(self.item_ids)

    def since(self, first: int) -> EventRows:
        """The events from `first` on."""
        return EventRows(**{f.name: getattr(self, f.name)[first:] for f in fields(self)})

    def histories(self, query_time: int) -> Histories:
        """One history of these events."""
        return histories_from_rows(
            [{**{f.name: getattr(self, f.name) for f in fields(self)}, "query_time": [query_time]}]
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UserLog:
    """A user's newest events; `dropped` older ones are not kept."""

    events: EventRows
    dropped: int = 0

    @property
    def total(self) -> int:
        return self.dropped + len(self.events)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptState:
    """A state, and how many events of the log it has seen."""

    state: UserState
    seen: int

    def agrees(self, log: UserLog) -> bool:
        """Whether the state's events are what the log says."""
        last = self.seen - log.dropped
        first = last - len(self.state.item_ids)
        skip = max(0, -first)  # events that the log no longer keeps
        if not 0 < last <= len(log.events):
            return False
        return all(
            np.array_equal(getattr(self.state, f.name)[skip:], getattr(log.events, f.name)[first + skip : last])
            for f in fields(EventRows)
        )


def _pack(kept: KeptState) -> bytes:
    return kept.seen.to_bytes(8, "little") + to_bytes(kept.state)


def _unpack(data: bytes) -> KeptState:
    return KeptState(seen=int.from_bytes(data[:8], "little"), state=from_bytes(data[8:]))


STATE_CODEC: Codec[KeptState] = Codec(
    nbytes=lambda kept: kept.state.nbytes + kept.state.rows.spare_bytes + _RECORD_BYTES,
    packed_nbytes=lambda kept: kept.state.nbytes + _RECORD_BYTES,
    pack=_pack,
    unpack=_unpack,
)


class UserLogs:
    """The logs of up to `max_users` users, each of its newest `max_events`; who was silent longest is forgotten."""

    def __init__(self, *, max_users: int, max_events: int) -> None:
        self.forgotten = 0
        self._max_users, self._max_events = max_users, max_events
        self._logs: OrderedDict[str, UserLog] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._logs)

    def get(self, user_id: str) -> UserLog:
        """The user's log; UnknownUserError when there is none."""
        with self._lock:
            log = self._logs.get(user_id)
            if log is None:
                raise UnknownUserError("no events of this user are known", fix="send events first, or with the request")
            self._logs.move_to_end(user_id)
            return log

    def append(self, user_id: str, new: EventRows, *, not_kept: int = 0) -> UserLog:
        """The log with the events in it, each in its place in time; equal times keep the order of arrival.

        `not_kept` more events happened that are not among them: they count in the log's total alone.
        """
        with self._lock:
            log = self._logs.get(user_id)
            parts = [new] if log is None else [log.events, new]
            joined = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(EventRows)}
            order = np.argsort(joined["timestamps"], kind="stable")
            excess = max(0, len(order) - self._max_events)
            events = EventRows(**{name: values[order][excess:] for name, values in joined.items()})
            after = UserLog(events=events, dropped=(0 if log is None else log.dropped) + not_kept + excess)
            self._logs[user_id] = after
            self._logs.move_to_end(user_id)
            while len(self._logs) > self._max_users:
                self._logs.popitem(last=False)
                self.forgotten += 1
            return after

    def delete(self, user_id: str) -> bool:
        """Nothing is known of the user any more; whether anything was."""
        with self._lock:
            return self._logs.pop(user_id, None) is not None


class Users(Protocol):
    """Where the service finds its users' logs: in this process, or shared with other replicas."""

    @property
    def forgotten(self) -> int: ...

    def __len__(self) -> int: ...

    async def get(self, user_id: str) -> UserLog: ...

    async def append(self, user_id: str, events: Sequence[RawEvent], rows: EventRows) -> UserLog: ...

    async def delete(self, user_id: str) -> bool: ...


class LocalUsers:
    """The logs of this process."""

    def __init__(self, *, max_users: int, max_events: int) -> None:
        self._logs = UserLogs(max_users=max_users, max_events=max_events)

    def __len__(self) -> int:
        return len(self._logs)

    @property
    def forgotten(self) -> int:
        return self._logs.forgotten

    async def get(self, user_id: str) -> UserLog:
        """The user's log; UnknownUserError when there is none."""
        return self._logs.get(user_id)

    async def append(self, user_id: str, events: Sequence[RawEvent], rows: EventRows) -> UserLog:  # noqa: ARG002
        """The log with the events, which `rows` are in the bundle's ids."""
        return self._logs.append(user_id, rows)

    async def delete(self, user_id: str) -> bool:
        """Nothing is known of the user any more; whether anything was."""
        return self._logs.delete(user_id)


def event_rows(item_ids: Sequence[int], actions: Sequence[int], timestamps: Sequence[int]) -> EventRows:
    """Events as arrays."""
    return EventRows(
        item_ids=np.asarray(item_ids, np.int64),
        actions=np.asarray(actions, np.int64),
        timestamps=np.asarray(timestamps, np.int64),
    )
