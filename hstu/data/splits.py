"""Leave-one-out splits by time: what a model is trained on, tested on and calibrated on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hstu.config import TASKS
from hstu.data.events import EventLog, Outcomes
from hstu.data.histories import Histories, Int64s
from hstu.data.vocabulary import Vocabulary
from hstu.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Every user's last event is a target; the users of `evaluation` are in no other split.

    train: the events of all other users up to, not including, the last (no target, no query time);
    train_outcomes: int8 [T, tasks], the outcomes of train's events in the order of `hstu.config.TASKS`, -1 = not known;
    calibration: some of train's users, with their last event as target.
    """

    train: Histories
    train_outcomes: Outcomes
    evaluation: Histories
    calibration: Histories


def build_vocabulary(log: EventLog) -> Vocabulary:
    """Items by falling frequency, equal ones by raw id: model id 1 is the most popular item."""
    frequency = np.bincount(log.items, minlength=len(log.item_ids))
    order = sorted(range(len(log.item_ids)), key=lambda code: (-frequency[code], log.item_ids[code]))
    return Vocabulary(items=tuple(log.item_ids[code] for code in order), actions=log.action_names)


def split_log(
    log: EventLog,
    vocabulary: Vocabulary,
    outcomes: Outcomes,
    *,
    evaluation_fraction: float,
    calibration_fraction: float,
    seed: int,
) -> Splits:
    """The splits of `log`; which users are held out depends on `seed` and on the number of users alone.

    Raises InputError when there are too few users for every split to have one.
    """
    num_users = len(log.user_ids)
    num_evaluation = max(1, round(num_users * evaluation_fraction))
    num_calibration = max(1, round(num_users * calibration_fraction))
    if num_evaluation + num_calibration > num_users:
        raise InputError(
            "the log has too few users to split",
            got=f"{num_users} users: {num_evaluation} to evaluate, {num_calibration} of the others to calibrate",
            expected="at least as many users as the two splits take",
            fix="bring a larger log, or lower evaluation_fraction and calibration_fraction",
        )
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(num_users)
    evaluation = np.sort(drawn[:num_evaluation])
    calibration = np.sort(drawn[num_evaluation : num_evaluation + num_calibration])
    training = np.sort(drawn[num_evaluation:])
    model_id = vocabulary.encode_items(log.item_ids)
    rows, train = _histories(log, model_id[log.items], outcomes, training, with_target=False)
    return Splits(
        train=train,
        train_outcomes=outcomes[rows],
        evaluation=_histories(log, model_id[log.items], outcomes, evaluation, with_target=True)[1],
        calibration=_histories(log, model_id[log.items], outcomes, calibration, with_target=True)[1],
    )


def _histories(
    log: EventLog, items: Int64s, outcomes: Outcomes, users: Int64s, *, with_target: bool
) -> tuple[Int64s, Histories]:
    """The log's rows in it, and the histories of `users` without each one's last event."""
    start, end = log.offsets[users], log.offsets[users + 1]
    last = end - 1
    lengths = last - start
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
    none = np.zeros(len(users), dtype=np.int64)
    return rows, Histories(
        item_ids=items[rows],
        actions=log.actions[rows],
        timestamps=log.timestamps[rows],
        offsets=offsets,
        query_time=log.timestamps[last] if with_target else none,
        target_item=items[last] if with_target else none,
        target_outcomes=outcomes[last] if with_target else np.full((len(users), len(TASKS)), -1, dtype=np.int8),
    )
