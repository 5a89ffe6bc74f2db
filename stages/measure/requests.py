"""Random requests: fresh for every round, the same for every runtime of a round, all from one seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hstu.checkpoints.histories import drawn_histories
from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from serving.engine import Array
from stages.measure.cases import Cell


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A batch of users as every runtime can take it: `feeds` for compiled entries, `histories` for slates."""

    histories: Histories
    feeds: dict[str, Array]
    new_events: int = 0  # since the visit before, of a returning user


def draw_request(config: HSTUConfig, cell: Cell, rng: np.random.Generator, *, candidates: int) -> Request:
    """A request of the cell's batch, length and occupancy; the longest history of a batch fills the cell's length."""
    histories = drawn_histories(
        config,
        count=cell.batch,
        seed=int(rng.integers(2**31)),
        lengths=draw_lengths(cell.batch, cell.length, cell.occupancy, rng),
    )
    feeds: dict[str, Array] = dict(histories.feeds(config, length=cell.length))
    if cell.entry == "rank":
        feeds["candidate_ids"] = rng.integers(1, config.num_items + 1, size=(cell.batch, candidates))
    return Request(histories=histories, feeds=feeds, new_events=cell.new_events)


def draw_lengths(batch: int, length: int, occupancy: float, rng: np.random.Generator) -> Array:
    """Lengths int64 [batch], the first `length`, the others uniform so that the mean is about occupancy · length."""
    if batch == 1 or occupancy == 1.0:
        return np.full(batch, length, dtype=np.int64)
    mean = max(1.0, (occupancy * batch - 1) * length / (batch - 1))
    spread = min(mean - 1, length - mean)
    others = rng.uniform(mean - spread, mean + spread, size=batch - 1)
    return np.concatenate([[length], np.clip(np.rint(others), 1, length)]).astype(np.int64)
