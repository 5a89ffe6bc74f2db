"""How good an answer is: ranked lists against the item that came next, scores against outcomes.

Ranked lists are int64 [B, K] item ids, best first; targets int64 [B], 0 = not known: such rows do not count.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hstu.errors import InputError

Ids = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.floating]


def hit_rate(top_item_ids: Ids, targets: Ids, *, k: int = 10) -> float:
    """HR@k: the share of histories whose target is among the first k items."""
    return float(_hits(top_item_ids, targets, k).any(axis=1).mean())


def ndcg(top_item_ids: Ids, targets: Ids, *, k: int = 10) -> float:
    """NDCG@k with one relevant item: the mean of 1 / log2(1 + rank), 0 beyond rank k (Järvelin & Kekäläinen 2002)."""
    hits = _hits(top_item_ids, targets, k)
    return float((hits / np.log2(2.0 + np.arange(hits.shape[1]))).sum(axis=1).mean())


def top_overlap(first: Ids, second: Ids, *, k: int = 10) -> float:
    """The mean share of the first k items that two answers [B, K] have in common, order aside."""
    if len(first) != len(second) or not len(first):
        raise InputError("top overlap: not the same histories", got=(len(first), len(second)))
    first, second = _first(first, k), _first(second, k)
    return float((first[:, :, None] == second[:, None, :]).any(axis=2).mean())


def auc(scores: Numbers, labels: npt.NDArray[np.integer]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties half (Mann-Whitney U).

    scores, labels: [n]; labels 1 and 0, anything below 0 is not known and does not count. InputError when
    there are no positives or no negatives to compare.
    """
    known = labels >= 0
    scores, positive = scores[known], labels[known] > 0
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        raise InputError("AUC: needs positives and negatives", got=f"{num_positive} and {num_negative}")
    _, value, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2.0  # equal scores share the mean of their ranks
    above = mean_rank[value][positive].sum() - num_positive * (num_positive + 1) / 2.0
    return float(above / (num_positive * num_negative))


def _hits(top_item_ids: Ids, targets: Ids, k: int) -> npt.NDArray[np.bool_]:
    """bool [known rows, k]."""
    known = targets > 0
    if len(targets) != len(top_item_ids) or not known.any():
        got = f"{len(top_item_ids)} answers, {int(known.sum())} known of {len(targets)} targets"
        raise InputError("ranking quality: nothing to compare with", got=got, expected="one answer per target")
    return np.asarray(_first(top_item_ids, k)[known] == targets[known][:, None])


def _first(top_item_ids: Ids, k: int) -> Ids:
    """The first k columns; all of them in a corpus of fewer items."""
    if k < 1:
        raise InputError("ranking quality: k must be positive", got=k)
    return top_item_ids[:, :k]
