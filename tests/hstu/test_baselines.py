"""The baselines give the answers that counting by hand gives."""

from __future__ import annotations

import numpy as np

from hstu import baselines
from hstu.data.histories import Histories, histories_from_rows


def rows(*items: list[int]) -> Histories:
    return histories_from_rows([{"item_ids": one, "timestamps": list(range(1, len(one) + 1))} for one in items])


TRAIN = rows([1, 2, 1, 3], [3, 1, 3], [1, 5], [])  # 1: 4 times, 3: 3 times, 2 and 5 once, 4 never


def test_popularity() -> None:
    top = baselines.popularity(TRAIN, rows([4], [2, 2]), num_items=5, k=4)
    assert top.tolist() == [[1, 3, 2, 5]] * 2
    assert baselines.popularity(TRAIN, rows([4]), num_items=5, k=9).shape == (1, 5)


def test_markov_follows_within_histories_only() -> None:
    """After 1 came 3 twice, 2 and 5 once; after 3 came 1 once (3 → 1 across two users does not count)."""
    top = baselines.markov(TRAIN, rows([2, 1], [3], [4], []), num_items=5, k=5)
    assert top[0].tolist() == [3, 2, 5, 1, 4]
    assert top[1].tolist() == [1, 3, 2, 5, 4]
    assert top[2].tolist() == top[3].tolist() == [1, 3, 2, 5, 4]  # nothing known: popularity


def test_repeats_count_first_and_then_the_newest() -> None:
    top = baselines.repeats(TRAIN, rows([4, 2, 5, 2, 4, 3], []), num_items=5, k=5)
    assert top[0].tolist() == [4, 2, 3, 5, 1]
    assert top[1].tolist() == [1, 3, 2, 5, 4]


def test_the_same_answer_every_time() -> None:
    rng = np.random.default_rng(0)
    train = rows(*[rng.integers(1, 21, 12).tolist() for _ in range(30)])
    for baseline in (baselines.popularity, baselines.markov, baselines.repeats):
        first = baseline(train, train, num_items=20, k=10)
        assert np.array_equal(first, baseline(train, train, num_items=20, k=10))
        assert all(len(set(row)) == 10 for row in first.tolist())
        assert first.min() >= 1
