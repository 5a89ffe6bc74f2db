"""What tests of the benchmark ask with: a cell, requests of it, right answers, and little effort."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from hstu.model import history_from_feeds
from serving.engine import Array
from stages.measure.cases import Cell, find_case
from stages.measure.contestants import Compiling
from stages.measure.interleave import Effort
from stages.measure.requests import Request, draw_request
from tests.models import TINY, random_model

EFFORT = Effort(
    cell_seconds=0.01, min_rounds=2, max_rounds=3, first_answer_s=60.0, compiling=Compiling(batches=(), threads=())
)
CASE = dataclasses.replace(find_case("trained"), entries=("retrieve", "rank"), batches=(1, 3), check_users=4)


def cell(**changes: Any) -> Cell:
    values: dict[str, Any] = {"case": "trained", "entry": "retrieve", "batch": 2, "length": 20, "occupancy": 1.0}
    return Cell(**values | {"thread_mode": "one"} | changes)


def request(entry: str = "retrieve", *, batch: int = 2, seed: int = 0) -> Request:
    drawn = cell(entry=entry, batch=batch, occupancy=0.5)
    return draw_request(TINY, drawn, np.random.default_rng(seed), candidates=5)


def answers(seed: int = 0) -> dict[str, Array]:
    model = random_model()
    feeds = {name: torch.as_tensor(value) for name, value in request(seed=seed).feeds.items()}
    embedding, items, scores = model.retrieve(history_from_feeds(feeds))
    return {"user_embedding": embedding.numpy(), "top_item_ids": items.numpy(), "top_scores": scores.numpy()}
