"""Recommenders that a trained model has to beat: popularity, first-order Markov, the user's own repeats.

Each returns the top K item ids int64 [B, K], best first, over the whole corpus and without any filter.
Equal scores go by popularity, then by id, so every answer is determined by the training histories.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hstu.data.histories import Histories, Int64s

Counts = npt.NDArray[np.int64]


def popularity(train: Histories, histories: Histories, *, num_items: int, k: int) -> Int64s:
    """The items that occur most often in training, the same for everybody."""
    return np.broadcast_to(_by_popularity(train, num_items)[:k], (len(histories), min(k, num_items))).copy()


def markov(train: Histories, histories: Histories, *, num_items: int, k: int) -> Int64s:
    """The items that followed the user's last item most often in training; then the popular ones."""
    starts = np.zeros(len(train.item_ids), dtype=bool)
    starts[train.offsets[:-1][train.lengths > 0]] = True
    follows = np.flatnonzero(~starts)  # an event that has one before it in its own history
    before, after = train.item_ids[follows - 1], train.item_ids[follows]
    order = np.argsort(before, kind="stable")
    first = np.searchsorted(before[order], np.arange(num_items + 2))
    last_item = np.zeros(len(histories), dtype=np.int64)
    some = histories.lengths > 0
    last_item[some] = histories.item_ids[histories.offsets[1:][some] - 1]
    rank = _rank(train, num_items)
    answers = np.empty((len(histories), min(k, num_items)), dtype=np.int64)
    for row, item in enumerate(last_item):
        successors = after[order[first[item] : first[item + 1]]]
        answers[row] = _best(np.bincount(successors, minlength=num_items + 1), rank, k)
    return answers


def repeats(train: Histories, histories: Histories, *, num_items: int, k: int) -> Int64s:
    """The user's own items, those repeated most often first, of equals the newest; then the popular ones."""
    rank = _rank(train, num_items)
    answers = np.empty((len(histories), min(k, num_items)), dtype=np.int64)
    for row in range(len(histories)):
        own = histories.item_ids[histories.offsets[row] : histories.offsets[row + 1]]
        counts = np.bincount(own, minlength=num_items + 1) * (len(own) + 1)
        counts[own] += np.arange(1, len(own) + 1)  # an item that occurs twice keeps its newest place
        answers[row] = _best(counts, rank, k)
    return answers


def _by_popularity(train: Histories, num_items: int) -> Int64s:
    """Every item id, the most frequent in training first."""
    counts = np.bincount(train.item_ids, minlength=num_items + 1)[1 : num_items + 1]
    return np.argsort(-counts, kind="stable") + 1


def _rank(train: Histories, num_items: int) -> Int64s:
    """int64 [num_items + 1]: 0 for the most popular item; item 0, the padding, comes after all."""
    rank = np.full(num_items + 1, num_items, dtype=np.int64)
    rank[_by_popularity(train, num_items)] = np.arange(num_items)
    return rank


def _best(counts: Counts, rank: Int64s, k: int) -> Int64s:
    counts[0] = -1
    return np.asarray(np.lexsort((rank, -counts))[: min(k, len(counts) - 1)], dtype=np.int64)
