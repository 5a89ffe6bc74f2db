"""Whether a narrow engine is worth what it loses: a short interleaved timing beside the next wider one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hstu.data.histories import Histories
from serving.engine import Array, Engine
from stages.measure.statistics import median_with_interval

REQUESTS = 4  # of the longest held-out histories
TURN_S = 0.02  # an engine answers about this long before the other has its turn
BUDGET_S = 4.0  # of both together
MIN_ROUNDS, MAX_ROUNDS = 8, 100


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedUp:
    """How many times faster with so many users a request: the median over rounds and its 95 % confidence interval."""

    users: int
    ratio: float
    low: float
    high: float

    @property
    def is_slower(self) -> bool:
        """Slower for certain: a machine that is busy widens the interval and proves nothing."""
        return self.high < 1.0

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.low:.2f}..{self.high:.2f}) as fast for {self.users} at once"


def measure_speed_up(engine: Engine, wider: Engine, histories: Histories, *, users: int) -> SpeedUp:
    """How much faster `engine` answers `retrieve` than `wider`, users with the longest of the histories.

    Each round asks both the same requests, one engine after the other and the other way round in turn, and gives
    one ratio: what disturbs the machine for longer than a round disturbs both.
    """
    config = engine.config
    order = np.resize(np.argsort(-histories.lengths, kind="stable")[: REQUESTS * users], (REQUESTS, users))
    requests = [histories.select(rows.tolist()).newest(config.max_history).feeds(config) for rows in order]
    pair = (engine, wider)
    for one in pair:
        _seconds(one, requests[:2])  # what is packed and allocated on first use is not counted
    num_requests = max(1, int(TURN_S / _seconds(wider, requests[:1])))
    asked = [requests[index % len(requests)] for index in range(num_requests)]
    ratios: list[float] = []
    started = time.perf_counter()
    while len(ratios) < MAX_ROUNDS and (len(ratios) < MIN_ROUNDS or time.perf_counter() - started < BUDGET_S):
        turns = pair if len(ratios) % 2 else pair[::-1]
        seconds = {id(one): _seconds(one, asked) for one in turns}
        ratios.append(seconds[id(wider)] / seconds[id(engine)])
    ratio, (low, high) = median_with_interval(ratios)
    return SpeedUp(users=users, ratio=ratio, low=low, high=high)


def _seconds(engine: Engine, requests: Sequence[dict[str, Array]]) -> float:
    started = time.perf_counter()
    for feeds in requests:
        engine.run("retrieve", feeds)
    return time.perf_counter() - started
