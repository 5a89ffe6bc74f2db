"""How good a model is on held-out users, beside what it has to beat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hstu import baselines
from hstu.data.histories import Histories
from hstu.metrics import auc, hit_rate, ndcg
from hstu.model import HSTU, history_from_feeds

TOP = 10
_BATCH = 64


def ranking_quality(model: HSTU, histories: Histories) -> dict[str, float]:
    """hr_at_10 and ndcg_at_10 over the whole corpus, without any filter."""
    answers = [model.retrieve(history_from_feeds(feeds))[1].numpy() for _, feeds in _batches(model, histories)]
    top = np.concatenate(answers)
    return {
        f"hr_at_{TOP}": hit_rate(top, histories.target_item, k=TOP),
        f"ndcg_at_{TOP}": ndcg(top, histories.target_item, k=TOP),
    }


def task_quality(model: HSTU, histories: Histories) -> dict[str, float]:
    """auc_<task> of every head: its score of the target at the query time, against what came of it.

    A constant has 0.5. Tasks whose outcomes are all alike, or not known, are left out.
    """
    scores = []
    for rows, feeds in _batches(model, histories):
        candidates = torch.from_numpy(rows.target_item).unsqueeze(1)
        scores.append(model.rank(history_from_feeds(feeds), candidates).squeeze(1).numpy())
    columns = zip(model.config.tasks, np.concatenate(scores).T, histories.target_outcomes.T, strict=True)
    return {
        f"auc_{task}": auc(score, label) for task, score, label in columns if (label == 0).any() and (label == 1).any()
    }


def baseline_quality(train: Histories, histories: Histories, *, num_items: int) -> dict[str, float]:
    """`<baseline>_hr_at_10` and `<baseline>_ndcg_at_10` of popularity, first-order Markov and the user's repeats."""
    quality = {}
    for baseline in (baselines.popularity, baselines.markov, baselines.repeats):
        top = baseline(train, histories, num_items=num_items, k=TOP)
        quality[f"{baseline.__name__}_hr_at_{TOP}"] = hit_rate(top, histories.target_item, k=TOP)
        quality[f"{baseline.__name__}_ndcg_at_{TOP}"] = ndcg(top, histories.target_item, k=TOP)
    return quality


def _batches(model: HSTU, histories: Histories) -> Iterator[tuple[Histories, dict[str, torch.Tensor]]]:
    """The histories in batches, as they are and as the model's inputs, cut to what it takes."""
    histories = histories.newest(model.config.max_history)
    with torch.inference_mode():
        for start in range(0, len(histories), _BATCH):
            rows = histories.select(range(start, min(start + _BATCH, len(histories))))
            yield rows, {name: torch.from_numpy(values) for name, values in rows.feeds(model.config).items()}
