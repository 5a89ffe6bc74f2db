"""Eager PyTorch without padding and with a last layer for one event gives eager PyTorch's answers."""

from __future__ import annotations

import pytest
import torch

from hstu.config import HSTUConfig
from hstu.model import history_from_feeds
from stages.entry_check import worst_error
from stages.measure.features import Featured
from tests.models import TINY, TINY_RESEARCH, random_model, tiny_config
from tests.stages.measure.requests import request


@pytest.mark.parametrize("config", [TINY, TINY_RESEARCH, tiny_config(num_layers=1)], ids=["tiny", "research", "one"])
@pytest.mark.parametrize("batch", [1, 5])
def test_answers_are_eager_pytorchs(config: HSTUConfig, batch: int) -> None:
    model = random_model(config)
    feeds = {name: torch.as_tensor(value) for name, value in request(batch=batch).feeds.items()}
    history = history_from_feeds(feeds)
    names = ("user_embedding", "top_item_ids", "top_scores")
    with torch.inference_mode():
        expected, got = model.retrieve(history), Featured(model).retrieve(history)
    left, right = ({n: v.numpy() for n, v in zip(names, values, strict=True)} for values in (expected, got))
    assert worst_error(left, right) <= 1e-6
