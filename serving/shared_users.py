"""Known users of many replicas: one keeper has every user's events, each replica a copy that it brings up to date.

The keeper numbers a user's events in the order in which they arrived; a replica asks for those after the last it has.
So an answer is right whichever replica gives it, after one has died or a new bundle took over; that a user comes back
to the same replica only makes it fast, because the state is there. Events are kept as they came (raw ids), so a bundle
with another vocabulary reads them too; items it does not know do not count.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from serving.users import EventRows, RawEvent, UnknownUserError, UserLog, UserLogs


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    """A user's events from number `first` on. `born` tells a user from the one of this name before a deletion."""

    born: int
    first: int
    events: list[RawEvent]


@dataclass(kw_only=True, slots=True)
class _Kept:
    born: int
    dropped: int = 0
    events: list[RawEvent] = field(default_factory=list)


class EventKeeper:
    """The newest `max_events` events of up to `max_users` users; who was silent longest is forgotten."""

    def __init__(self, *, max_users: int, max_events: int) -> None:
        self._max_users, self._max_events = max_users, max_events
        self._users: OrderedDict[str, _Kept] = OrderedDict()
        self._births = 0

    def append(self, user_id: str, events: Sequence[RawEvent], born: int, seen: int) -> News:
        """The events are kept; the news for a replica that has seen `seen` events of the user born then."""
        kept = self._users.get(user_id)
        if kept is None:
            self._births += 1
            kept = self._users[user_id] = _Kept(born=self._births)
        kept.events += events
        excess = max(0, len(kept.events) - self._max_events)
        del kept.events[:excess]
        kept.dropped += excess
        self._users.move_to_end(user_id)
        while len(self._users) > self._max_users:
            self._users.popitem(last=False)
        return self._news(kept, born, seen)

    def since(self, user_id: str, born: int, seen: int) -> News | None:
        """The news for a replica; None: nothing is known of the user."""
        kept = self._users.get(user_id)
        if kept is None:
            return None
        self._users.move_to_end(user_id)
        return self._news(kept, born, seen)

    def delete(self, user_id: str) -> bool:
        """Nothing is known of the user any more; whether anything was."""
        return self._users.pop(user_id, None) is not None

    def _news(self, kept: _Kept, born: int, seen: int) -> News:
        first = max(seen, kept.dropped) if born == kept.born else kept.dropped
        return News(born=kept.born, first=first, events=kept.events[first - kept.dropped :])


class Keeper(Protocol):
    """An EventKeeper in another process."""

    async def append(self, user_id: str, events: Sequence[RawEvent], born: int, seen: int) -> News: ...

    async def since(self, user_id: str, born: int, seen: int) -> News | None: ...

    async def delete(self, user_id: str) -> bool: ...


class SharedUsers:
    """A replica's copy of the logs, the keeper's before every answer."""

    def __init__(
        self, keeper: Keeper, encode: Callable[[Sequence[RawEvent]], EventRows], *, max_users: int, max_events: int
    ) -> None:
        """`encode` gives events in the bundle's ids, without those it does not know."""
        self._keeper, self._encode = keeper, encode
        self._logs = UserLogs(max_users=max_users, max_events=max_events)
        self._seen: OrderedDict[str, tuple[int, int]] = OrderedDict()  # born, events seen
        self._max_users = max_users

    def __len__(self) -> int:
        return len(self._logs)

    @property
    def forgotten(self) -> int:
        return self._logs.forgotten

    async def get(self, user_id: str) -> UserLog:
        """The user's log as the keeper has it; UnknownUserError when there is none."""
        news = await self._keeper.since(user_id, *self._place(user_id))
        if news is None:
            self._forget(user_id)
            raise UnknownUserError("no events of this user are known", fix="send events first, or with the request")
        return self._take(user_id, news)

    async def append(self, user_id: str, events: Sequence[RawEvent], rows: EventRows) -> UserLog:  # noqa: ARG002
        """The log with the events in it."""
        return self._take(user_id, await self._keeper.append(user_id, events, *self._place(user_id)))

    async def delete(self, user_id: str) -> bool:
        """Nothing is known of the user any more; whether anything was."""
        self._forget(user_id)
        return await self._keeper.delete(user_id)

    def _place(self, user_id: str) -> tuple[int, int]:
        return self._seen.get(user_id, (0, 0))

    def _take(self, user_id: str, news: News) -> UserLog:
        """News that another request of this user has taken meanwhile are not taken twice."""
        born, seen = self._place(user_id)
        if news.born < born:  # the user was deleted and came back while this was under way
            return self._logs.get(user_id)
        before = 0
        if news.born > born or news.first > seen:  # the copy is none of this user, or misses events that are gone
            self._logs.delete(user_id)
            seen = before = news.first
        fresh = news.events[seen - news.first :]
        rows = self._encode(fresh)
        log = self._logs.append(user_id, rows, not_kept=before + len(fresh) - len(rows))
        self._seen[user_id] = (news.born, seen + len(fresh))
        self._seen.move_to_end(user_id)
        while len(self._seen) > self._max_users:
            self._forget(next(iter(self._seen)))
        return log

    def _forget(self, user_id: str) -> None:
        self._seen.pop(user_id, None)
        self._logs.delete(user_id)
