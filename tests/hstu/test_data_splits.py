"""Every user's last event is held out, and the users of evaluation are in no other split."""

from __future__ import annotations

import numpy as np
import pytest

from hstu.data.events import EventLog, Outcomes
from hstu.data.splits import Splits, build_vocabulary, split_log
from hstu.errors import InputError


def some_log(num_users: int, *, seed: int = 0) -> tuple[EventLog, Outcomes]:
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users), rng.integers(2, 9, num_users))
    log = EventLog(
        users=users,
        items=rng.permutation(np.resize(np.arange(30), len(users))),
        actions=rng.integers(1, 3, len(users)),
        timestamps=np.arange(len(users)) + 1,  # every event's time is its row + 1
        dwell_s=np.full(len(users), np.nan),
        price=np.full(len(users), np.nan),
        user_ids=tuple(f"u{user:03d}" for user in range(num_users)),
        item_ids=tuple(f"i{item}" for item in range(30)),
        action_names=("view", "like"),
    )
    return log, rng.integers(-1, 2, (len(users), 3)).astype(np.int8)


def split(log: EventLog, outcomes: Outcomes, *, seed: int = 0) -> Splits:
    return split_log(
        log, build_vocabulary(log), outcomes, evaluation_fraction=0.25, calibration_fraction=0.1, seed=seed
    )


def test_items_go_by_frequency_and_then_by_raw_id() -> None:
    log, _ = some_log(1)
    log = EventLog(
        **{name: getattr(log, name)[:2] for name in ("users", "actions", "timestamps", "dwell_s", "price")},
        items=np.array([2, 2, 1, 3, 0, 0])[:2],
        user_ids=("u",),
        item_ids=("a", "c", "d", "b"),
        action_names=("view", "like"),
    )
    assert build_vocabulary(log).items == ("d", "a", "b", "c")
    assert build_vocabulary(log).actions == ("view", "like")


def test_splits_hold_each_event_where_it_belongs() -> None:
    log, outcomes = some_log(100)
    vocabulary = build_vocabulary(log)
    splits = split(log, outcomes)
    assert (len(splits.train), len(splits.evaluation), len(splits.calibration)) == (75, 25, 10)
    for part in (splits.train, splits.evaluation, splits.calibration):
        rows = part.timestamps - 1  # by construction of the log
        assert [vocabulary.item(i) for i in part.item_ids] == [log.item_ids[i] for i in log.items[rows]]
        assert (part.actions == log.actions[rows]).all()
        for index in range(len(part)):
            own = rows[part.offsets[index] : part.offsets[index + 1]]
            user = log.users[own[0]]
            assert own.tolist() == np.flatnonzero(log.users == user)[:-1].tolist()
    for part in (splits.evaluation, splits.calibration):
        rows = part.query_time - 1
        assert (rows == part.timestamps[part.offsets[1:] - 1]).all()  # the row after the last of the history
        assert [vocabulary.item(i) for i in part.target_item] == [log.item_ids[i] for i in log.items[rows]]
        assert (part.target_outcomes == outcomes[rows]).all()
    assert (splits.train_outcomes == outcomes[splits.train.timestamps - 1]).all()


def test_training_knows_nothing_of_any_target_or_held_out_user() -> None:
    log, outcomes = some_log(100)
    splits = split(log, outcomes)
    assert not splits.train.target_item.any()
    assert not splits.train.query_time.any()
    assert (splits.train.target_outcomes == -1).all()
    trained = set(splits.train.timestamps.tolist())
    assert not trained & set(splits.evaluation.timestamps.tolist())
    assert not trained & set(splits.evaluation.query_time.tolist())
    assert not trained & set(splits.calibration.query_time.tolist())
    assert set(splits.calibration.timestamps.tolist()) <= trained
    assert len(trained) + len(splits.evaluation.timestamps) + 100 == len(log)


def test_who_is_held_out_depends_on_the_seed() -> None:
    log, outcomes = some_log(100)
    first, again, other = split(log, outcomes), split(log, outcomes), split(log, outcomes, seed=1)
    assert (first.evaluation.query_time == again.evaluation.query_time).all()
    assert set(first.evaluation.query_time.tolist()) != set(other.evaluation.query_time.tolist())


def test_two_users_are_enough_and_one_is_not() -> None:
    splits = split(*some_log(2))
    assert (len(splits.train), len(splits.evaluation), len(splits.calibration)) == (1, 1, 1)
    with pytest.raises(InputError, match="too few users"):
        split(*some_log(1))
