"""Extending a cached history equals computing the whole of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hstu.model import HSTU, History
from tests.models import TINY, TINY_RESEARCH, random_histories, random_model


def _history(model: HSTU, lengths: list[int], seed: int) -> History:
    feeds = random_histories(model.config, lengths=lengths, seed=seed).feeds(model.config)
    tensors = {name: torch.as_tensor(value) for name, value in feeds.items()}
    return History(**tensors)


def _part(history: History, start: torch.Tensor, stop: torch.Tensor) -> History:
    """Events start..stop-1 of every row, moved to the front."""
    width = int((stop - start).max())
    index = (start.unsqueeze(1) + torch.arange(width)).clamp(max=history.item_ids.shape[1] - 1)
    inside = torch.arange(width) < (stop - start).unsqueeze(1)

    def take(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, index) * inside

    return History(
        item_ids=take(history.item_ids),
        timestamps=take(history.timestamps),
        actions=None if history.actions is None else take(history.actions),
        lengths=stop - start,
        query_time=history.query_time,
    )


@pytest.mark.parametrize("config", [TINY, TINY_RESEARCH], ids=["features", "research"])
@pytest.mark.parametrize("splits", [[0, 0, 0], [5, 1, 12], [7, 0, 19]])
def test_extend_equals_retrieve(config, splits):
    model = random_model(config, seed=3)
    history = _history(model, [8, 2, 20], seed=5)
    start = torch.minimum(torch.tensor(splits), history.lengths - 1)

    # what an earlier visit leaves: every row but the last of the events seen then
    first = replace(_part(history, torch.zeros_like(start), start + 1), query_time=torch.full((3,), 2_000_000_000))
    width = config.num_heads * (config.qk_dim + config.v_dim)
    empty = torch.full((3, config.num_layers, 1, width), float("nan"))  # no rows yet: what stands there is never read
    *_, rows = model.extend(first, empty, torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    cache = rows.clone()
    for row, length in enumerate(start.tolist()):
        cache[row, :, length:] = float("nan")
    times = first.timestamps

    rest = _part(history, start, history.lengths)
    embedding, items, scores, _ = model.extend(rest, cache, times, start)
    expected_embedding, expected_items, expected_scores = model.retrieve(history)
    torch.testing.assert_close(embedding, expected_embedding, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores, expected_scores, atol=1e-5, rtol=0)
    assert torch.equal(items[:, :10], expected_items[:, :10])
