"""Histories for a checkpoint from elsewhere: drawn from its own items, or a log in another vocabulary."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hstu.checkpoints.histories import drawn_histories, spread_rows, translated_histories, with_tasks
from hstu.data.histories import Histories
from hstu.data.vocabulary import Vocabulary
from hstu.errors import InputError
from hstu.model import HSTU, history_from_feeds
from serving.engine import check_feeds
from tests.models import TINY, TINY_RESEARCH, random_histories, random_model, tiny_config


def arrays(histories: Histories) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [getattr(histories, name) for name in histories.__slots__]


@pytest.mark.parametrize("config", [TINY, TINY_RESEARCH, tiny_config(num_actions=1), tiny_config(max_history=1)])
def test_drawn_histories_fit_the_model(config: object) -> None:
    histories = drawn_histories(config, count=40, seed=3)  # type: ignore[arg-type]
    model: HSTU = random_model(config)  # type: ignore[arg-type]
    feeds = histories.feeds(model.config)
    check_feeds(model.config, "retrieve", feeds)
    assert set(histories.lengths) >= {1, model.config.max_history}
    assert (histories.query_time > 0).all()
    last = histories.timestamps[histories.offsets[1:] - 1]
    assert (histories.query_time >= last).all()
    assert (histories.target_item == 0).all()
    assert (histories.target_outcomes == -1).all()
    tensors = {name: torch.from_numpy(values) for name, values in feeds.items()}
    assert torch.isfinite(model.retrieve(history_from_feeds(tensors))[0]).all()


def test_drawn_histories_depend_on_their_arguments_alone() -> None:
    one, again, other = (drawn_histories(TINY, count=20, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(again), strict=True))
    assert not np.array_equal(one.item_ids[:20], other.item_ids[:20])


def test_drawn_items_are_skewed_and_drawn_times_have_sessions() -> None:
    config = tiny_config(num_items=5000, max_history=50)
    histories = drawn_histories(config, count=400, seed=0)
    counts = np.sort(np.bincount(histories.item_ids, minlength=5001))[::-1]
    assert counts[:50].sum() > 0.35 * counts.sum()  # 1 % of the items: Zipf gives them about half
    assert (counts > 0).sum() > 1500
    assert np.bincount(histories.item_ids)[:20].sum() < 0.3 * counts.sum()  # the popular ones are not the first ids
    inside = np.ones(len(histories.timestamps), dtype=bool)
    inside[histories.offsets[:-1]] = False
    gaps = np.diff(histories.timestamps, prepend=0)[inside]
    assert (gaps >= 0).all()
    assert 0.5 < (gaps < 1800).mean() < 0.95
    assert (gaps > 43_200).mean() > 0.05


LOG = Vocabulary(items=("40", "7", "150"), actions=("view", "buy"))


def log() -> Histories:
    return replace(
        random_histories(lengths=[2, 1]),
        item_ids=np.array([1, 2, 3]),
        actions=np.array([2, 0, 1]),
        target_item=np.array([3, 0]),
        target_outcomes=np.array([[1, 0, 1], [-1, 0, 0]], dtype=np.int8),
    )


def test_a_log_in_raw_ids() -> None:
    config = TINY_RESEARCH
    translated = translated_histories(log(), config, known_as=LOG, vocabulary=Vocabulary.raw(150))
    assert translated.item_ids.tolist() == [40, 7, 150]
    assert translated.target_item.tolist() == [150, 0]
    assert translated.actions.tolist() == [0, 0, 0]  # the model has no action input
    assert np.array_equal(translated.timestamps, log().timestamps)


def test_a_log_in_the_ids_and_actions_of_another_vocabulary() -> None:
    vocabulary = Vocabulary(items=("7", "150", "8", "40"), actions=("buy", "rent"))
    translated = translated_histories(log(), TINY, known_as=LOG, vocabulary=vocabulary)
    assert translated.item_ids.tolist() == [4, 1, 2]
    assert translated.actions.tolist() == [1, 0, 0]  # "view" is not known to the model


def test_outcomes_of_the_tasks_a_model_has() -> None:
    assert with_tasks(log(), ("monetisation", "delight")).target_outcomes.tolist() == [[1, -1], [0, -1]]
    assert with_tasks(log(), TINY.tasks).target_outcomes.tolist() == log().target_outcomes.tolist()
    assert with_tasks(log(), ()).target_outcomes.shape == (2, 0)


@pytest.mark.parametrize("items", [("40", "151", "0"), ("40", "07", "150"), ("40", "item-7", "-1")])
def test_items_the_checkpoint_does_not_know_are_named(items: tuple[str, ...]) -> None:
    known_as = Vocabulary(items=items, actions=LOG.actions)
    with pytest.raises(InputError, match=r"(?s)items that the checkpoint does not know.*integers 1\.\.150.*event_log"):
        translated_histories(log(), TINY_RESEARCH, known_as=known_as, vocabulary=Vocabulary.raw(150))


def test_spread_rows_leaves_out_empty_histories() -> None:
    histories = random_histories(lengths=[0, 1, 0, 2, 3, 4, 5])
    assert spread_rows(histories, 3).tolist() == [1, 4, 6]
    assert spread_rows(histories, 99).tolist() == [1, 3, 4, 5, 6]
    assert spread_rows(random_histories(lengths=[0]), 3).tolist() == []
