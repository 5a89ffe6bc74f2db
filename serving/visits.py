"""The engine's side of the service: batches of histories retrieved, and of known users visited with their states.

Everything here runs in one thread, the engine's own, so states are read, used and put back without a race.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hstu.config import HSTUConfig
from hstu.data.histories import Histories, histories_from_rows
from hstu.errors import CompilerError
from serving.cache import HotCache
from serving.engine import Array, check_feeds
from serving.user_state import Answers, StatefulEngine, UserState, extend, start
from serving.users import KeptState, UserLog


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What is asked of the engine: a history, or a known user's log with the key of the state."""

    history: Histories  # of one user; of a known user the whole log
    user_id: str | None = None
    log: UserLog | None = None
    query_time: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the engine gives: item ids int64 [K], cosines float32 [K], the embedding float32 [D]; from which state."""

    item_ids: Array
    scores: Array
    embedding: Array
    cache: str  # none (no known user), miss, or hit
    compute_s: float
    batch: int


class Visits:
    """Answers batches of visits with one engine and the cache of states."""

    def __init__(self, stateful: StatefulEngine, cache: HotCache, *, clock: Callable[[], float] = time.time) -> None:
        self.stateful, self._cache, self._clock = stateful, cache, clock
        self._seconds_per_event = 1e-4

    def __call__(self, visits: Sequence[Visit]) -> list[Found | Exception]:
        """An answer or what went wrong for every visit, in order; a user's visits in one batch see one another."""
        found: list[Found | Exception | None] = [None] * len(visits)
        waves: list[list[int]] = []
        turn: dict[str, int] = {}
        for row, visit in enumerate(visits):  # the same user twice: one after the other
            wave = turn.get(visit.user_id, 0) if visit.user_id is not None else 0
            if visit.user_id is not None:
                turn[visit.user_id] = wave + 1
            while len(waves) <= wave:
                waves.append([])
            waves[wave].append(row)
        for rows in waves:
            for row, answer in zip(rows, self._wave([visits[row] for row in rows]), strict=True):
                found[row] = answer
        return [answer for answer in found if answer is not None]

    def _wave(self, visits: Sequence[Visit]) -> list[Found | Exception]:
        answers: list[Found | Exception | None] = [None] * len(visits)
        plain = [row for row, visit in enumerate(visits) if visit.log is None]
        hot: list[tuple[int, KeptState]] = []
        cold: list[int] = []
        for row, visit in enumerate(visits):
            if visit.log is None or visit.user_id is None:
                continue
            kept = self._kept(visit.user_id, visit.log)
            if kept is None:
                cold.append(row)
            else:
                hot.append((row, kept))
        if hot:
            rows = [row for row, _ in hot]
            self._group(visits, rows, "hit", answers, lambda: self._extend([visits[r] for r in rows], hot))
        if cold:
            self._group(visits, cold, "miss", answers, lambda: self._start([visits[row] for row in cold]))
        if plain:
            self._group(visits, plain, "none", answers, lambda: self._retrieve([visits[row] for row in plain]))
        return [answer for answer in answers if answer is not None]

    def _kept(self, user_id: str, log: UserLog) -> KeptState | None:
        """The user's state if it agrees with the log; one that does not is dropped."""
        kept = self._cache.get("user", self._key(user_id), self._clock())
        if kept is None:
            return None
        if kept.state.origin == self.stateful.origin and kept.agrees(log):
            return kept  # type: ignore[no-any-return]
        self._cache.drop("user", self._key(user_id))
        return None

    def _key(self, user_id: str) -> str:
        return state_key(self.stateful.origin.engine, user_id)

    def _group(
        self,
        visits: Sequence[Visit],
        rows: Sequence[int],
        cache: str,
        answers: list[Found | Exception | None],
        compute: Callable[[], tuple[list[UserState] | None, Answers]],
    ) -> None:
        began = time.perf_counter()
        try:
            states, outputs = compute()
        except CompilerError as error:
            for row in rows:
                answers[row] = error
            return
        took = time.perf_counter() - began
        for place, row in enumerate(rows):
            answers[row] = Found(
                item_ids=outputs["top_item_ids"][place],
                scores=outputs["top_scores"][place],
                embedding=outputs["user_embedding"][place],
                cache=cache,
                compute_s=took,
                batch=len(rows),
            )
            user_id, log = visits[row].user_id, visits[row].log
            if states is not None and user_id is not None and log is not None:
                kept = KeptState(state=states[place], seen=log.total)
                cost_s = self._cold_cost(len(log.events), took / len(rows) if cache == "miss" else None)
                key, now = self._key(user_id), self._clock()
                self._cache.put("user", key, kept, cost_s=cost_s, now=now, missed=cache == "miss")

    def _cold_cost(self, events: int, measured_s: float | None) -> float:
        """Seconds to compute a user of so many events anew, by what first visits took so far."""
        if measured_s is not None:
            self._seconds_per_event += 0.05 * (measured_s / max(events, 1) - self._seconds_per_event)
        return self._seconds_per_event * max(events, 1)

    def _retrieve(self, visits: Sequence[Visit]) -> tuple[None, Answers]:
        engine = self.stateful.engine
        feeds = join([visit.history for visit in visits]).feeds(engine.config)
        check_feeds(engine.config, "retrieve", feeds)
        return None, engine.run("retrieve", feeds)

    def _start(self, visits: Sequence[Visit]) -> tuple[list[UserState], Answers]:
        return start(self.stateful, join([visit.history for visit in visits]))

    def _extend(self, visits: Sequence[Visit], hot: Sequence[tuple[int, KeptState]]) -> tuple[list[UserState], Answers]:
        new = []
        for visit, (_, kept) in zip(visits, hot, strict=True):
            assert visit.log is not None
            new.append(visit.log.events.since(kept.seen - visit.log.dropped).histories(visit.query_time))
        return extend(self.stateful, [kept.state for _, kept in hot], join(new))


def state_key(engine: str, user_id: str) -> str:
    """The key of a user's state: every engine has its own."""
    return f"{engine}/{user_id}"


def join(parts: Sequence[Histories]) -> Histories:
    """One batch of histories of one user each."""
    names = ("item_ids", "actions", "timestamps", "query_time")
    return histories_from_rows([{name: getattr(part, name) for name in names} for part in parts])


def feeds_for_rank(history: Histories, candidates: Array, config: HSTUConfig) -> dict[str, Array]:
    """Inputs of `rank` for one history and candidates int64 [C]."""
    return {**history.feeds(config), "candidate_ids": np.asarray(candidates, np.int64)[None]}
