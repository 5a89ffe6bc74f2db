"""Greedy slates by full recompute: what they hold, and that they do what the definition says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hstu.data.histories import Histories
from hstu.errors import InputError
from hstu.model import History, history_from_feeds
from serving.slate import append_items, extend_history, greedy_slate
from tests.models import TINY, random_histories, random_model, tiny_config


def _history(histories: Histories) -> History:
    feeds = histories.feeds(TINY)
    return history_from_feeds({name: torch.from_numpy(value) for name, value in feeds.items()})


def test_each_step_is_the_best_allowed_item_of_the_history_extended_by_hand() -> None:
    """One user at a time, the events written out: chosen items stand at the query time with action 0."""
    model, histories = random_model(), random_histories(num_users=6, seed=1)
    ids, scores = greedy_slate(model, _history(histories), 4)
    for user in range(len(histories)):
        one = histories.select([user])
        query_time = int(one.feeds(TINY)["query_time"][0])
        items, times, actions = list(one.item_ids), list(one.timestamps), list(one.actions)
        for step in range(4):
            state = model.encode(
                History(
                    item_ids=torch.tensor([items]),
                    timestamps=torch.tensor([times]),
                    actions=torch.tensor([actions]),
                    lengths=torch.tensor([len(items)]),
                    query_time=torch.tensor([query_time]),
                )
            )[0, -1]
            table = model.item_embedding.weight[1:]
            cosine = torch.nn.functional.cosine_similarity(state, table, eps=1e-12)
            cosine[ids[user, :step] - 1] = -2.0
            assert int(cosine.argmax()) + 1 == int(ids[user, step])
            assert float(cosine.max()) == pytest.approx(float(scores[user, step]), abs=1e-5)
            items.append(int(ids[user, step]))
            times.append(query_time)
            actions.append(0)


def test_constraints_hold_and_are_switchable() -> None:
    model, histories = random_model(), random_histories(num_users=30, seed=2)
    history = _history(histories)
    ids, scores = greedy_slate(model, history, 10)
    assert all(len(set(row)) == 10 for row in ids.tolist())
    assert int(ids.min()) >= 1
    assert bool((scores.diff(dim=1).abs() > 0).any())
    repeated, _ = greedy_slate(model, history, 10, no_repeats=False)
    assert any(len(set(row)) < 10 for row in repeated.tolist())
    fresh, _ = greedy_slate(model, history, 10, exclude_history=True)
    seen = [set(part.tolist()) for part in np.split(histories.item_ids, histories.offsets[1:-1])]
    assert not any(seen[user] & set(row) for user, row in enumerate(fresh.tolist()))
    assert any(seen[user] & set(row) for user, row in enumerate(ids.tolist()))


def test_users_do_not_influence_one_another() -> None:
    model, histories = random_model(), random_histories(num_users=7, seed=3)
    together, _ = greedy_slate(model, _history(histories), 5)
    alone = [greedy_slate(model, _history(histories.select([user])), 5)[0] for user in range(7)]
    assert torch.equal(together, torch.cat(alone))


def test_a_slate_that_cannot_be_made_is_refused() -> None:
    model, history = random_model(), _history(random_histories(num_users=3))
    for num_items in (0, TINY.max_generated + 1):
        with pytest.raises(InputError, match="slate this long"):
            greedy_slate(model, history, num_items)
    few = tiny_config(num_items=9)
    with pytest.raises(InputError, match="too few items"):
        greedy_slate(random_model(few), _history(random_histories(few, num_users=3)), 10)


def test_append_puts_the_item_after_the_last_event() -> None:
    history = extend_history(_history(random_histories(lengths=[0, 3])), 1)
    after = append_items(history, torch.tensor([7, 8]))
    assert after.item_ids[0, 0] == 7
    assert after.item_ids[1, 3] == 8
    assert after.timestamps[1, 3] == history.query_time[1]
    assert after.lengths.tolist() == [1, 4]
    assert after.actions is not None
    assert after.actions[1, 3] == 0
