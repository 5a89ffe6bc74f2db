"""Ranking quality and AUC against what they are by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hstu.errors import InputError
from hstu.metrics import auc, hit_rate, ndcg, top_overlap

TOP = np.array([[5, 3, 9], [1, 2, 3], [7, 8, 9], [4, 5, 6]])


def test_hit_rate_and_ndcg_by_hand() -> None:
    targets = np.array([3, 9, 7, 0])  # second place, not there, first place, not known
    assert hit_rate(TOP, targets, k=3) == pytest.approx(2 / 3)
    assert hit_rate(TOP, targets, k=1) == pytest.approx(1 / 3)
    assert ndcg(TOP, targets, k=3) == pytest.approx((1 / math.log2(3) + 0 + 1) / 3)
    assert ndcg(TOP, targets, k=1) == pytest.approx(1 / 3)
    assert hit_rate(TOP, targets, k=100) == hit_rate(TOP, targets, k=3)


def test_overlap_by_hand() -> None:
    other = np.array([[3, 5, 1], [4, 5, 6], [9, 8, 7], [4, 5, 6]])
    assert top_overlap(TOP, other, k=3) == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert top_overlap(TOP, other, k=1) == pytest.approx(1 / 4)
    assert top_overlap(TOP, TOP, k=2) == 1.0


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    for levels in (2, 5, 1000):
        scores = rng.integers(0, levels, 300).astype(np.float32)
        labels = rng.integers(-1, 2, 300)
        positive, negative = scores[labels == 1], scores[labels == 0]
        pairs = np.sign(positive[:, None] - negative[None, :])
        assert auc(scores, labels) == pytest.approx(0.5 + pairs.mean() / 2)
    assert auc(np.array([0.1, 0.9, 0.8]), np.array([0, 1, 1])) == 1.0
    assert auc(np.ones(4), np.array([0, 1, 1, 0])) == 0.5


def test_nothing_to_compare_is_an_error() -> None:
    for targets in (np.zeros(4, dtype=np.int64), np.array([1, 2])):
        with pytest.raises(InputError):
            hit_rate(TOP, targets)
    with pytest.raises(InputError):
        ndcg(TOP, np.array([1, 2, 3, 4]), k=0)
    with pytest.raises(InputError):
        top_overlap(TOP, TOP[:2])
    with pytest.raises(InputError):
        auc(np.array([0.5, 0.6]), np.array([1, -1]))
