"""Outcomes by rule: 1 and 0 where the log tells, -1 where it does not."""

from __future__ import annotations

import numpy as np
import pytest

from hstu.config import TASKS
from hstu.data.events import EventLog
from hstu.data.outcomes import derive_outcomes

DAY = 86_400
NAN = float("nan")


def outcomes(
    *,
    users: list[int],
    timestamps: list[int],
    actions: list[int] | None = None,
    dwell_s: list[float] | None = None,
    price: list[float] | None = None,
    names: tuple[str, ...] = ("view", "like", "purchase"),
) -> dict[str, list[int]]:
    count = len(users)
    log = EventLog(
        users=np.array(users, dtype=np.int64),
        items=np.zeros(count, dtype=np.int64),
        actions=np.array(actions or [0] * count, dtype=np.int64),
        timestamps=np.array(timestamps, dtype=np.int64),
        dwell_s=np.array(dwell_s or [NAN] * count),
        price=np.array(price or [NAN] * count),
        user_ids=tuple(f"u{u}" for u in range(max(users) + 1)),
        item_ids=("i",),
        action_names=names,
    )
    derived = derive_outcomes(
        log,
        engagement_actions=("like", "purchase"),
        engagement_dwell_s=30,
        purchase_actions=("purchase",),
        return_after_h=6,
        return_within_days=7,
    )
    assert derived.dtype == np.int8
    return {task: derived[:, index].tolist() for index, task in enumerate(TASKS)}


def test_engagement_is_an_action_or_a_long_dwell() -> None:
    got = outcomes(users=[0] * 4, timestamps=[1, 2, 3, 4], actions=[1, 2, 1, 1], dwell_s=[29.9, NAN, 30, NAN])
    assert got["engagement"] == [0, 1, 1, 0]


def test_engagement_is_not_known_without_actions_and_dwell() -> None:
    got = outcomes(users=[0] * 3, timestamps=[1, 2, 3], dwell_s=[NAN, 5, 50], names=())
    assert got["engagement"] == [-1, 0, 1]


def test_monetisation_is_a_purchase_that_was_not_for_nothing() -> None:
    got = outcomes(users=[0] * 4, timestamps=[1, 2, 3, 4], actions=[3, 3, 3, 1], price=[5, 0, NAN, 5])
    assert got["monetisation"] == [1, 0, 1, 0]
    assert outcomes(users=[0], timestamps=[1], actions=[1], names=("view",))["monetisation"] == [-1]


@pytest.mark.parametrize(
    ("timestamps", "expected"),
    [
        ([1, 1 + 6 * 3600], [-1, -1]),  # still the same visit, and the log ends
        ([1, 2 + 6 * 3600], [1, -1]),
        ([1, 1 + 7 * DAY], [1, -1]),
        ([1, 2 + 7 * DAY], [0, -1]),
        ([1, 100, 1 + 2 * DAY, 1 + 20 * DAY], [1, 1, 0, -1]),
    ],
)
def test_retention_is_a_later_visit_in_time(timestamps: list[int], expected: list[int]) -> None:
    assert outcomes(users=[0] * len(timestamps), timestamps=timestamps)["retention"] == expected


def test_retention_sees_no_other_user() -> None:
    got = outcomes(users=[0, 1, 1], timestamps=[1, DAY, 60 * DAY])
    assert got["retention"] == [0, 0, -1]


def test_retention_matches_its_definition_on_a_random_log() -> None:
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, 20, 300))
    times = rng.integers(1, 40 * DAY, 300)
    order = np.lexsort((times, users))
    users, times = users[order], times[order]
    expected = []
    for user, time in zip(users, times, strict=True):
        later = times[users == user] - time
        back = bool(((later > 6 * 3600) & (later <= 7 * DAY)).any())
        expected.append(1 if back else 0 if time + 7 * DAY <= times.max() else -1)
    assert set(expected) == {-1, 0, 1}
    assert outcomes(users=users.tolist(), timestamps=times.tolist())["retention"] == expected
