"""The reference log is the one that is documented: deterministic, well-formed, and worth learning."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import pytest

from hstu.baselines import markov, popularity
from hstu.data.events import EventLog, Outcomes
from hstu.data.reference_log import CLICK, ENGAGED_DWELL_S, LIKE, PURCHASE, VIEW, reference_log
from hstu.data.splits import build_vocabulary, split_log
from hstu.metrics import auc, hit_rate, ndcg

SESSION_S = 6 * 3600


@cache
def default_log() -> tuple[EventLog, Outcomes]:
    return reference_log(num_users=6000, num_items=3000, events_per_user=40, seed=7)


def digest(log: EventLog, outcomes: Outcomes) -> str:
    arrays = (log.users, log.items, log.actions, log.timestamps, log.dwell_s, log.price, outcomes)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_the_same_arguments_give_the_same_log() -> None:
    small = {"num_users": 40, "num_items": 200, "events_per_user": 20}
    assert digest(*reference_log(**small, seed=1)) == digest(*reference_log(**small, seed=1))
    assert digest(*reference_log(**small, seed=1)) != digest(*reference_log(**small, seed=2))


@pytest.mark.parametrize(
    ("num_users", "num_items", "events_per_user"), [(10, 100, 10), (50, 1234, 100), (300, 149, 15)]
)
def test_other_sizes_are_well_formed(num_users: int, num_items: int, events_per_user: int) -> None:
    log, outcomes = reference_log(num_users=num_users, num_items=num_items, events_per_user=events_per_user, seed=3)
    assert (len(log.user_ids), len(log.item_ids)) == (num_users, num_items)
    assert list(log.item_ids) == sorted(set(log.item_ids))
    assert outcomes.shape == (len(log), 3)
    assert ((log.items >= 0) & (log.items < num_items)).all()
    assert (np.diff(log.offsets) >= 6).all()
    same_user = np.diff(log.users) == 0
    assert (np.diff(log.users) >= 0).all()
    assert (np.diff(log.timestamps)[same_user] > 0).all()


def test_size_and_skew() -> None:
    log, outcomes = default_log()
    assert 35 * 6000 < len(log) < 300_000
    frequency = np.sort(np.bincount(log.items))[::-1]
    assert len(frequency) == 3000
    assert 0.45 < frequency[:600].sum() / len(log) < 0.8  # a fifth of the items has half of the events
    assert ((0.15 < outcomes.mean(axis=0)) & (outcomes.mean(axis=0) < 0.7)).all()
    assert set(np.unique(log.actions)) == {VIEW, CLICK, LIKE, PURCHASE}


def test_outcomes_show_in_action_and_dwell() -> None:
    log, outcomes = default_log()
    engaged, _, paid = outcomes.T.astype(bool)
    assert ((log.dwell_s >= ENGAGED_DWELL_S) == engaged).all()
    assert ((log.actions == PURCHASE) == paid).all()
    assert engaged[log.actions >= LIKE].all()
    assert not engaged[log.actions == VIEW].any()


def test_a_retained_user_comes_back_sooner() -> None:
    log, outcomes = default_log()
    gap = np.diff(log.timestamps)
    away = (np.diff(log.users) == 0) & (gap > SESSION_S)
    retained = outcomes[:-1, 1] == 1
    assert np.median(gap[away & retained]) < 2 * 86_400 < 4 * 86_400 < np.median(gap[away & ~retained])


def test_repeat_visits_happen() -> None:
    log, _ = default_log()
    pairs = len(set(zip(log.users.tolist(), log.items.tolist(), strict=True)))
    assert 0.15 < 1 - pairs / len(log) < 0.6


def test_longer_context_tells_more_than_the_last_item() -> None:
    """Successors of all the last 30 items, weighted, are far better than those of the last item alone."""
    log, outcomes = default_log()
    vocabulary = build_vocabulary(log)
    splits = split_log(log, vocabulary, outcomes, evaluation_fraction=1 / 6, calibration_fraction=0.05, seed=7)
    train, held_out = splits.train, splits.evaluation
    quality = {}
    for name, recommend in (("popularity", popularity), ("markov", markov)):
        top = recommend(train, held_out, num_items=vocabulary.num_items, k=10)
        quality[name] = (hit_rate(top, held_out.target_item), ndcg(top, held_out.target_item))
    size = vocabulary.num_items + 1
    follows = np.ones(len(train.item_ids), dtype=bool)
    follows[train.offsets[:-1]] = False
    after = np.flatnonzero(follows)
    successors = np.zeros((size, size), dtype=np.float32)
    np.add.at(successors, (train.item_ids[after - 1], train.item_ids[after]), 1)
    successors /= np.maximum(1, successors.sum(axis=1, keepdims=True))
    top = np.empty((len(held_out), 10), dtype=np.int64)
    for row in range(len(held_out)):
        own = held_out.item_ids[held_out.offsets[row] : held_out.offsets[row + 1]][-30:][::-1]
        scores = (successors[own] * 0.85 ** np.arange(len(own), dtype=np.float32)[:, None]).sum(axis=0)
        top[row] = np.argsort(-scores, kind="stable")[:10]
    context = (hit_rate(top, held_out.target_item), ndcg(top, held_out.target_item))
    assert quality["popularity"][0] < 0.1 < quality["markov"][0] < 0.35
    assert context[0] > 1.5 * quality["markov"][0]
    assert context[1] > 1.3 * quality["markov"][1]


def test_a_users_past_tells_outcomes() -> None:
    """The rate of each outcome in a user's past alone ranks the outcome of the last event better than chance."""
    log, outcomes = default_log()
    last = log.offsets[1:] - 1
    for task in range(3):
        past = np.add.reduceat(outcomes[:, task].astype(float), log.offsets[:-1]) - outcomes[last, task]
        assert auc(past / (np.diff(log.offsets) - 1), outcomes[last, task].astype(np.int64)) > 0.6
