"""How likely a key is to be asked for again soon: learned from what is asked for, while it is asked for.

For every key that was ever seen (up to `capacity`, resident or not: a record is some 150 bytes, a user's state
is 100 to 100 000 times that) a few running figures are kept:

    decayed frequency   Σ 2^(-(now - t)/h) over its requests t, for each half-life h of `HALF_LIVES_S`
    recency             when it was asked for last, and how that age stands to its usual gap (a running mean of logs)
    periodicity         the mean direction of its requests on the clock of a day: a length of 1 means "always at this
                        hour", 0 "at any hour"; compared with the hour that comes next

A logistic model over these gives P(asked for again within the horizon), and is trained online: a prediction made now
is a lesson as soon as the key returns or the horizon has passed. The same outcomes are the published accuracy. After
Song et al., "Learning Relaxed Belady for CDN Caching" (NSDI 2020), with a linear model in place of boosted trees.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Slots = npt.NDArray[np.int64]

HALF_LIVES_S = tuple(15.0 * 4.0**step for step in range(9))  # from 15 s to eleven days
DAY_S = 86400.0
_FEATURES = len(HALF_LIVES_S) + 9
_NEVER = -1.0
_BATCH = 64  # lessons a step
_RATE = 0.03
_ADAM = (0.9, 0.999, 1e-8)
_FIRST_DECAY = 0.02  # the last fifty requests
_SETTLED = 1024  # lessons that are kept though they are learned, so that it is not cleared up at every request
_LOWEST = 1e-3  # a decayed frequency below it is as good as none


@dataclass(frozen=True, slots=True)
class _Lesson:
    """A prediction whose outcome is awaited."""

    slot: int
    generation: int  # of the slot: the key may be forgotten meanwhile
    time: float
    features: Floats
    probability: float


@dataclass(slots=True)
class Accuracy:
    """What became of predictions: how many, how many on the right side of one half, and their mean squared error."""

    predictions: int = 0
    right: int = 0
    squared_error: float = 0.0

    @property
    def share_right(self) -> float:
        return self.right / self.predictions if self.predictions else math.nan

    @property
    def brier(self) -> float:
        return self.squared_error / self.predictions if self.predictions else math.nan


class Heat:
    """Running figures of up to `capacity` keys, and the model over them. Not thread-safe: its cache locks."""

    def __init__(self, *, capacity: int = 1 << 17, horizon_s: float = 600.0, seed: int = 0) -> None:
        self.horizon_s = horizon_s
        self.accuracy = Accuracy()
        self._slots: dict[str, int] = {}
        self._keys: list[str | None] = [None] * capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._held = np.zeros(capacity, np.bool_)  # its owner has it: not to be forgotten
        self._generation = np.zeros(capacity, np.int64)
        self._last = np.full(capacity, _NEVER)
        self._decayed = np.zeros((capacity, len(HALF_LIVES_S)))
        self._log_gap = np.zeros(capacity)
        self._gaps = np.zeros(capacity)
        self._hour = np.zeros((capacity, 2))  # decayed mean direction
        self._crowd = np.zeros(capacity)  # how many of the requests around its first one were first ones
        self._first_share = 0.0
        self._rates = -math.log(2.0) / np.array(HALF_LIVES_S)
        self._random = np.random.default_rng(seed)
        self._weights, self._first, self._second = (np.zeros(_FEATURES) for _ in range(3))
        self._steps = 0
        self._open: dict[int, _Lesson] = {}
        self._queue: deque[_Lesson] = deque()
        self._learned: list[tuple[Floats, float]] = []

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, key: str) -> int | None:
        """Where the figures of a key are; None when it was never seen, or has been forgotten."""
        return self._slots.get(key)

    def key(self, slot: int) -> str:
        """The key whose figures are in a slot."""
        found = self._keys[slot]
        if found is None:
            raise KeyError(slot)
        return found

    def hold(self, slot: int, held: bool) -> None:
        """The figures of a slot are not forgotten while it is held."""
        self._held[slot] = held

    def seen(self, key: str, now: float) -> int:
        """The key was asked for; its slot. The outcome of an awaited prediction is learned."""
        slot = self._slots.get(key)
        self._first_share += _FIRST_DECAY * (float(slot is None) - self._first_share)
        if slot is None:
            slot = self._new_slot(key)
            self._crowd[slot] = self._first_share
        lesson = self._open.pop(slot, None)
        if lesson is not None:
            self._learn(lesson, float(now - lesson.time < self.horizon_s))
        last = float(self._last[slot])
        if last >= 0.0:
            age = max(now - last, 0.0)
            self._decayed[slot] *= np.exp(self._rates * age)
            if age > 0.0:
                share = max(0.2, 1.0 / (self._gaps[slot] + 1.0))
                self._log_gap[slot] += share * (math.log(age + 1.0) - self._log_gap[slot])
                self._gaps[slot] += 1.0
        self._decayed[slot] += 1.0
        angle = 2.0 * math.pi * (now % DAY_S) / DAY_S
        direction = self._hour[slot]
        direction += 0.1 * (np.array((math.cos(angle), math.sin(angle))) - direction)
        self._last[slot] = now
        self._expire(now)
        return slot

    def predict(self, slots: Slots, now: float) -> Floats:
        """P(asked for again within the horizon), float64 [slots]."""
        return self._probability(self._features(slots, now))

    def watch(self, slot: int, now: float) -> None:
        """Make a prediction that is held against what comes, unless one of this key is awaited already."""
        self._expire(now)
        if slot in self._open:
            return
        features = self._features(np.array([slot]), now)[0]
        probability = float(self._probability(features))
        lesson = _Lesson(slot, int(self._generation[slot]), now, features, probability)
        self._open[slot] = lesson
        self._queue.append(lesson)
        if len(self._queue) > 2 * len(self._open) + _SETTLED:  # most of them have long been learned
            self._queue = deque(one for one in self._queue if self._open.get(one.slot) is one)

    def likely(self, now: float, slots: Sequence[int], *, at_least: float) -> list[tuple[float, int]]:
        """Those of `slots` that will be asked for again with at least this probability, the likeliest first."""
        if not slots:
            return []
        found = self.predict(np.asarray(slots, np.int64), now)
        order = np.argsort(-found, kind="stable")
        return [(float(found[i]), int(slots[i])) for i in order if found[i] >= at_least]

    def _features(self, slots: Slots, now: float) -> Floats:
        """float64 [slots, _FEATURES]."""
        age = np.maximum(now - self._last[slots], 0.0)
        decayed = self._decayed[slots] * np.exp(age[:, None] * self._rates)
        relative = np.log((age + 1.0) / self.horizon_s)
        regular = self._gaps[slots] > 0
        overdue = np.where(regular, np.clip(np.log(age + 1.0) - self._log_gap[slots], -6.0, 6.0), 0.0)
        gap = np.where(regular, np.clip(self._log_gap[slots] - math.log(self.horizon_s), -8.0, 8.0), 0.0)
        middle = 2.0 * math.pi * ((now + 0.5 * min(self.horizon_s, DAY_S)) % DAY_S) / DAY_S
        hour = self._hour[slots]
        along = hour[:, 0] * math.cos(middle) + hour[:, 1] * math.sin(middle)
        return np.column_stack(
            [
                np.log(decayed + _LOWEST) / 3.0,
                np.ones(len(slots)),
                np.clip(relative, -8.0, 8.0) / 3.0,
                np.clip(relative, 0.0, 8.0),  # beyond the horizon hope may fall faster
                ~regular,
                np.where(regular, 0.0, self._crowd[slots]) * 2.0,
                overdue / 3.0,
                np.maximum(overdue, 0.0) / 3.0,
                gap / 3.0,
                along,
            ]
        )

    def _probability(self, features: Floats) -> Floats:
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(features @ self._weights, -30.0, 30.0))))

    def _learn(self, lesson: _Lesson, outcome: float) -> None:
        self.accuracy.predictions += 1
        self.accuracy.right += (lesson.probability >= 0.5) == (outcome >= 0.5)
        self.accuracy.squared_error += (lesson.probability - outcome) ** 2
        self._learned.append((lesson.features, outcome))
        if len(self._learned) < _BATCH:
            return
        features = np.stack([one for one, _ in self._learned])
        outcomes = np.array([one for _, one in self._learned])
        self._learned.clear()
        gradient = features.T @ (self._probability(features) - outcomes) / len(outcomes)
        self._steps += 1
        decay1, decay2, least = _ADAM
        self._first = decay1 * self._first + (1.0 - decay1) * gradient
        self._second = decay2 * self._second + (1.0 - decay2) * gradient**2
        first = self._first / (1.0 - decay1**self._steps)
        second = self._second / (1.0 - decay2**self._steps)
        self._weights -= _RATE * first / (np.sqrt(second) + least)

    def _expire(self, now: float) -> None:
        """Predictions older than the horizon did not come true."""
        while self._queue and now - self._queue[0].time >= self.horizon_s:
            lesson = self._queue.popleft()
            if self._open.get(lesson.slot) is lesson:
                del self._open[lesson.slot]
                self._learn(lesson, 0.0)

    def _new_slot(self, key: str) -> int:
        if not self._free:
            self._forget()
        slot = self._free.pop()
        self._slots[key] = slot
        self._keys[slot] = key
        return slot

    def _forget(self) -> None:
        """The oldest of some keys that nobody holds is forgotten."""
        while True:
            some = self._random.integers(0, len(self._keys), 64)
            some = some[~self._held[some]]
            if len(some):
                break
        slot = int(some[np.argmin(self._last[some])])
        self._open.pop(slot, None)
        del self._slots[self.key(slot)]
        self._keys[slot] = None
        self._generation[slot] += 1
        self._last[slot] = _NEVER
        self._decayed[slot] = 0.0
        self._log_gap[slot] = self._gaps[slot] = 0.0
        self._hour[slot] = 0.0
        self._free.append(slot)
