"""Users shared by replicas: every replica's log is what one process would have, in whatever order requests come."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import numpy as np
import pytest

from serving.shared_users import EventKeeper, News, SharedUsers
from serving.users import EventRows, RawEvent, UnknownUserError, UserLog, UserLogs, event_rows

MAX_EVENTS = 12


class SlowKeeper:
    """A keeper that answers later, so that requests overtake one another."""

    def __init__(self, *, max_users: int = 100) -> None:
        self.keeper = EventKeeper(max_users=max_users, max_events=4 * MAX_EVENTS)
        self._chance = random.Random(3)

    async def append(self, user_id: str, events: Sequence[RawEvent], born: int, seen: int) -> News:
        news = self.keeper.append(user_id, events, born, seen)
        await asyncio.sleep(self._chance.choice([0.0, 0.0005]))
        return news

    async def since(self, user_id: str, born: int, seen: int) -> News | None:
        news = self.keeper.since(user_id, born, seen)
        await asyncio.sleep(self._chance.choice([0.0, 0.0005]))
        return news

    async def delete(self, user_id: str) -> bool:
        return self.keeper.delete(user_id)


def encode(events: Sequence[RawEvent]) -> EventRows:
    known = [event for event in events if event[0] != "unknown"]
    return event_rows([int(item) for item, _, _ in known], [0] * len(known), [time for _, time, _ in known])


def replica(keeper: SlowKeeper) -> SharedUsers:
    return SharedUsers(keeper, encode, max_users=100, max_events=MAX_EVENTS)


def same(found: UserLog, expected: UserLog) -> bool:
    return found.total == expected.total and all(
        np.array_equal(getattr(found.events, name), getattr(expected.events, name))
        for name in ("item_ids", "actions", "timestamps")
    )


def test_whichever_replica_is_asked_the_log_is_that_of_one_process():
    chance = random.Random(7)

    async def scenario() -> None:
        keeper = SlowKeeper()
        replicas = [replica(keeper) for _ in range(3)]
        alone = UserLogs(max_users=100, max_events=MAX_EVENTS)
        for step in range(300):
            user = f"u{chance.randrange(3)}"
            if step == 150:
                replicas[0] = replica(keeper)  # one died, another stands in
            if chance.random() < 0.6:
                events: list[RawEvent] = [(chance.randrange(1, 9), chance.randrange(1000), None)] * chance.randrange(
                    1, 4
                )
                alone.append(user, encode(events))
                await chance.choice(replicas).append(user, events, encode(events))
            elif chance.random() < 0.05:
                assert await chance.choice(replicas).delete(user) == alone.delete(user)
            else:
                asked = [chance.choice(replicas).get(user) for _ in range(3)]
                try:
                    expected = alone.get(user)
                except UnknownUserError:
                    for one in asked:
                        with pytest.raises(UnknownUserError):
                            await one
                    continue
                found = await asyncio.gather(*asked)
                # late events beyond the model's length may be cut at other moments, so totals are compared always
                assert {log.total for log in found} == {expected.total}
                assert all(len(log.events) == len(expected.events) for log in found)

    asyncio.run(scenario())


def test_events_in_order_give_the_same_log_everywhere():
    async def scenario() -> None:
        keeper = SlowKeeper()
        replicas = [replica(keeper), replica(keeper)]
        alone = UserLogs(max_users=10, max_events=MAX_EVENTS)
        for time in range(40):
            events: list[RawEvent] = [(1 + time % 7, 10 * time, None)]
            alone.append("u", encode(events))
            await replicas[time % 2].append("u", events, encode(events))
            assert same(await replicas[time // 3 % 2].get("u"), alone.get("u"))

    asyncio.run(scenario())


def test_a_deleted_user_who_comes_back_is_another():
    async def scenario() -> None:
        keeper = SlowKeeper()
        first, second = replica(keeper), replica(keeper)
        await first.append("u", [(1, 1, None), (2, 2, None)], encode([(1, 1, None), (2, 2, None)]))
        assert (await second.get("u")).total == 2
        assert await first.delete("u")
        with pytest.raises(UnknownUserError):
            await second.get("u")
        await first.append("u", [(5, 9, None)] * 3, encode([(5, 9, None)] * 3))
        log = await second.get("u")
        assert (log.total, log.events.item_ids.tolist()) == (3, [5, 5, 5])

    asyncio.run(scenario())


def test_items_that_the_bundle_does_not_know_count_but_are_not_events():
    async def scenario() -> None:
        keeper = SlowKeeper()
        events: list[RawEvent] = [(1, 1, None), ("unknown", 2, None), (3, 3, None)]
        await replica(keeper).append("u", events, encode(events))
        log = await replica(keeper).get("u")
        assert (log.total, log.events.item_ids.tolist()) == (3, [1, 3])

    asyncio.run(scenario())


def test_the_keeper_forgets_who_was_silent_longest():
    keeper = EventKeeper(max_users=2, max_events=4)
    for user in ("a", "b", "c"):
        keeper.append(user, [(1, 1, None)], 0, 0)
    assert keeper.since("a", 0, 0) is None
    news = keeper.append("c", [(n, n, None) for n in range(6)], 0, 0)
    assert (news.first, len(news.events)) == (3, 4)
