"""Users as they behave: a history to begin with, then now and then an event, mostly on what was recommended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.load.wire import Wire

_EVENT_SHARE = 0.5  # of the turns in which something happened since the last
_CHECK_EVERY = 10  # answers of a user, of which one is kept to be compared with the answer alone


@dataclass(kw_only=True, slots=True)
class Tally:
    """What came back: seconds by kind of request, statuses, and some answers with what they were asked with."""

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    broken: int = 0
    fallbacks: int = 0
    hits: int = 0
    kept: list[tuple[list[dict[str, Any]], dict[str, Any]]] = field(default_factory=list)

    def count(self, status: int, seconds: float) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.seconds.append(seconds)


@dataclass(kw_only=True, slots=True)
class User:
    """One session."""

    name: str
    wire: Wire
    rng: np.random.Generator
    items: Sequence[str | int]
    length: int  # events to begin with
    limit: int  # events the model takes
    strategy: str
    body: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    now: int = 1_750_000_000
    answered: list[Any] = field(default_factory=list)
    turns: int = 0

    async def begin(self, tally: Tally) -> None:
        """The history is known to the server."""
        await self._happen([self._event() for _ in range(self.length)], tally)

    async def turn(self, tally: Tally) -> None:
        """Perhaps an event, then a recommendation."""
        self.turns += 1
        if self.rng.random() < _EVENT_SHARE:
            await self._happen([self._event()], tally)
        asked = {"user_id": self.name, "k": 10, **({"strategy": self.strategy} if self.strategy else {}), **self.body}
        answer = await self._ask(tally, "/v1/recommend", asked)
        if answer is None:
            return
        self.answered = [item["item_id"] for item in answer["items"]]
        served = answer.get("served", {})
        tally.fallbacks += bool(served.get("fallbacks"))
        tally.hits += served.get("cache") == "hit"
        if self.turns % _CHECK_EVERY == 5:
            tally.kept.append((self.events[-self.limit :], answer))

    def _event(self) -> dict[str, Any]:
        self.now += int(self.rng.exponential(60.0)) + 1
        likes = self.answered and self.rng.random() < 0.6
        item = self.answered[int(self.rng.integers(len(self.answered)))] if likes else self._any()
        return {"item_id": item, "timestamp": self.now}

    def _any(self) -> str | int:
        return self.items[int(self.rng.zipf(1.3)) % len(self.items)]

    async def _happen(self, events: list[dict[str, Any]], tally: Tally) -> None:
        if await self._ask(tally, f"/v1/users/{self.name}/events", {"events": events}) is not None:
            self.events += events

    async def _ask(self, tally: Tally, path: str, body: dict[str, Any]) -> Any:
        began = time.perf_counter()
        try:
            status, answer = await self.wire.ask("POST", path, body, user=self.name)
        except (ConnectionError, TimeoutError):
            tally.broken += 1
            return None
        tally.count(status, time.perf_counter() - began)
        if status == 429:
            await asyncio.sleep(0.05)
        return answer if status == 200 else None


async def steady(users: Sequence[User], *, seconds: float, tally: Tally) -> None:
    """Every user asks about once a second (exponential pauses cut at three seconds) until the time is over."""
    until = time.monotonic() + seconds

    async def live(user: User) -> None:
        await asyncio.sleep(float(user.rng.uniform(0.0, 1.0)))
        while time.monotonic() < until:
            began = time.monotonic()
            await user.turn(tally)
            pause = min(float(user.rng.exponential(1.0)), 3.0) - (time.monotonic() - began)
            await asyncio.sleep(max(0.0, pause))

    await asyncio.gather(*(live(user) for user in users))


async def saturated(users: Sequence[User], *, seconds: float, tally: Tally) -> None:
    """Every user asks again as soon as there is an answer."""
    until = time.monotonic() + seconds

    async def live(user: User) -> None:
        while time.monotonic() < until:
            await user.turn(tally)

    await asyncio.gather(*(live(user) for user in users))
