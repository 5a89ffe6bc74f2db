"""The recommender as a service: one request in, one answer out, whatever has to be asked, fallen back to or kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hstu.errors import InputError, UsageError
from serving.bundle import Bundle
from serving.cache import HotCache
from serving.engine import Array
from serving.engine_order import TORCH
from serving.fallback import LOG, Fallback
from serving.items import EMBEDDING_CODEC, ItemEmbeddings
from serving.requests import encode_requests
from serving.runtimes import Candidates, Runtimes
from serving.schemas import (
    Event,
    Filters,
    RecommendAnswer,
    RecommendRequest,
    ScoreAnswer,
    ScoreRequest,
    TaskWeights,
    to_request,
)
from serving.settings import ServiceSettings
from serving.users import STATE_CODEC, EventRows, LocalUsers, UserLog, Users, event_rows
from serving.visits import Visit, state_key

_COST_SHARE = 0.5  # of the deadline that a strategy chosen by `auto` may be expected to take
_PREFETCH_EVERY_S = 5.0


class Service:
    """A bundle, its runtimes, its known users and the cache of their states."""

    def __init__(self, bundle: Bundle, settings: ServiceSettings, *, users: Users | None = None) -> None:
        self.bundle, self.settings = bundle, settings
        memory = settings.cache_mib << 20
        self.cache = HotCache(
            {"user": STATE_CODEC, "item": EMBEDDING_CODEC},
            memory_bytes=memory,
            device_bytes=int(memory * settings.device_share),
            disk=settings.disk,
            disk_bytes=settings.disk_mib << 20,
        )
        max_events = bundle.config.max_history
        self.users = LocalUsers(max_users=settings.max_users, max_events=max_events) if users is None else users
        self.runtimes = Runtimes(bundle, settings, self.cache)
        self.seconds = {"engine": 0.005, "unified": 0.02, "vllm": 0.2, "torch": 0.02}  # measured as answers are made
        self._items = ItemEmbeddings(bundle.path, self.cache)
        items = bundle.vocabulary.items
        self._integer_ids = all(item.isascii() and item.isdigit() and item == str(int(item)) for item in items)
        self._prefetching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """The engine is open and has answered once; workers are up, or starting under care."""
        await self.runtimes.start()
        await self._warm_up()
        self._prefetching = asyncio.create_task(self._prefetch(), name="prefetch")
        LOG.info("serving bundle %s with %s", self.bundle.artifact.id[:12], " → ".join(self.runtimes.order))

    async def _warm_up(self) -> None:
        """The first engine has answered every kind of request once, so that no user waits for its first time."""
        events = event_rows([1, 1], [0, 0], [1, 1])
        log = UserLog(events=events.since(1))
        user_id = "warm up"  # no user's id: it has a space
        for visit in (
            Visit(history=events.histories(0)),
            Visit(history=log.events.histories(0), user_id=user_id, log=log),
            Visit(history=events.histories(0), user_id=user_id, log=UserLog(events=events)),
        ):
            await self.runtimes.retrieve(visit, time.monotonic() + 60.0)
        visit, count = Visit(history=events.histories(0)), min(8, self.settings.max_queue)
        warm = [self.runtimes.retrieve(visit, time.monotonic() + 60.0) for _ in range(count)]
        await asyncio.gather(*warm)
        self._drop_states(user_id)

    async def close(self) -> None:
        """Everything that was started has ended."""
        if self._prefetching is not None:
            self._prefetching.cancel()
        await self.runtimes.close()

    async def recommend(self, request: RecommendRequest, *, arrived: float | None = None) -> RecommendAnswer:
        """The answer; InputError for what is wrong with the request, BusyError, LateError or UnavailableError."""
        began = time.monotonic() if arrived is None else arrived
        deadline = began + (request.deadline_ms or self.settings.deadline_ms) / 1e3
        rows, log = await self._history(request.user_id, request.events)
        allowed = self._allowed(request.filters, rows)
        strategy = self._strategy(request, deadline - time.monotonic())
        visit = _visit(request, rows, log)
        if strategy == "vllm" or (strategy == "unified" and request.candidates_from == "vllm"):
            found = await self.runtimes.generate(visit, request.k, deadline)
        else:
            found = await self.runtimes.retrieve(visit, deadline, order=[TORCH] if strategy == "torch" else None)
        fallbacks = list(found.fallbacks)
        keep = allowed(found.item_ids)
        item_ids, scores = found.item_ids[keep], found.scores[keep]
        tasks: Array | None = None
        ranker = None
        if strategy == "unified" and len(item_ids):
            tasks, ranker, fell = await self.runtimes.rank_or_not(visit.history, item_ids, deadline)
            fallbacks += fell
            if tasks is not None:
                scores = self._weighted(tasks, request.task_weights)
                best_first = np.argsort(-scores, kind="stable")
                item_ids, scores, tasks = item_ids[best_first], scores[best_first], tasks[best_first]
        took = time.monotonic() - began
        self.seconds[strategy] += 0.05 * (took - self.seconds[strategy])
        names = self.bundle.config.tasks
        items = [
            {
                "item_id": self.raw_item(int(item)),
                "score": float(score),
                "tasks": None if tasks is None else dict(zip(names, map(float, tasks[place]), strict=True)),
            }
            for place, (item, score) in enumerate(zip(item_ids[: request.k], scores[: request.k], strict=True))
        ]
        served = self._served(strategy, found.runtime, found, took, fallbacks, ranker)
        return RecommendAnswer.model_validate({"user_id": request.user_id, "items": items, "served": served})

    async def score(self, request: ScoreRequest, *, arrived: float | None = None) -> ScoreAnswer:
        """Each candidate's probability per task, by the ranker, or by eager PyTorch when that is down."""
        config = self.bundle.config
        if not config.tasks:
            raise InputError("this model has no task heads", fix="serve a bundle whose checkpoint has tasks")
        began = time.monotonic() if arrived is None else arrived
        deadline = began + (request.deadline_ms or self.settings.deadline_ms) / 1e3
        rows, log = await self._history(request.user_id, request.events)
        visit = _visit(request, rows, log)
        candidates = np.array([self._item(raw) for raw in request.candidates], np.int64)
        tasks, ranker, fallbacks = await self.runtimes.score(visit.history, candidates, deadline)
        similarity: Array | None = None
        found: Candidates | None = None
        if request.similarity:
            found = await self.runtimes.retrieve(visit, deadline)
            assert found.found is not None
            fallbacks = [*fallbacks, *found.fallbacks]
            similarity = self._items.rows(candidates.tolist()) @ found.found.embedding
        items = [
            {
                "item_id": self.raw_item(int(item)),
                "tasks": dict(zip(config.tasks, map(float, tasks[place]), strict=True)),
                "similarity": None if similarity is None else float(similarity[place]),
            }
            for place, item in enumerate(candidates)
        ]
        took = time.monotonic() - began
        served = self._served("engine", ranker, found, took, fallbacks, ranker)
        return ScoreAnswer.model_validate({"user_id": request.user_id, "items": items, "served": served})

    async def add_events(self, user_id: str, events: Sequence[Event]) -> int:
        """How many events the user has, all told, these among them."""
        raw = [(event.item_id, event.timestamp, event.action) for event in events]
        return (await self.users.append(user_id, raw, self._encode(user_id, list(events)))).total

    async def delete_user(self, user_id: str) -> bool:
        """Nothing is known of the user any more; whether anything was."""
        known = await self.users.delete(user_id)
        return self._drop_states(user_id) or known

    def _drop_states(self, user_id: str) -> bool:
        dropped = [self.cache.drop("user", state_key(name, user_id)) for name in self.runtimes.order]
        return any(dropped)

    def raw_item(self, model_id: int) -> str | int:
        """The raw id as the log had it: a number where every raw id is one."""
        raw = self.bundle.vocabulary.item(model_id)
        return int(raw) if self._integer_ids else raw

    def _served(
        self,
        strategy: str,
        runtime: str,
        found: Candidates | None,
        took: float,
        fallbacks: Sequence[Fallback],
        ranker: str | None,
    ) -> dict[str, Any]:
        state = None if found is None else found.found
        timing = {
            "queue_ms": 0.0 if found is None else found.waited_s * 1e3,
            "compute_ms": 0.0 if state is None else state.compute_s * 1e3,
            "total_ms": took * 1e3,
        }
        return {
            "strategy": strategy,
            "runtime": runtime,
            "precision": self.runtimes.precision(runtime),
            "ranker": ranker,
            "cache": "none" if state is None else state.cache,
            "timing": {name: round(value, 3) for name, value in timing.items()},
            "fallbacks": [fallback.to_dict() for fallback in fallbacks],
            "bundle": self.bundle.artifact.id,
        }

    def _strategy(self, request: RecommendRequest, left_s: float) -> str:
        """The strategy asked for; `auto`: unified while it is expected within half the time left, else engine."""
        if request.strategy == "unified" and not self.bundle.config.tasks:
            raise UsageError("this model has no task heads, so nothing can be ranked", expected="engine, vllm, torch")
        if request.strategy != "auto":
            return request.strategy
        ranker = self.runtimes.workers.get("ranker")
        affordable = self.seconds["unified"] <= _COST_SHARE * left_s
        return "unified" if ranker is not None and ranker.ready and affordable else "engine"

    async def _history(self, user_id: str | None, events: Sequence[Event] | None) -> tuple[EventRows, UserLog | None]:
        if events is not None:
            return self._encode(user_id, list(events)), None
        if user_id is None:
            raise InputError("neither events nor a user", expected="events, or the user_id of a known user")
        log = await self.users.get(user_id)
        return log.events, log

    def _encode(self, user_id: str | None, events: list[Event]) -> EventRows:
        request = to_request(user_id, events, None)
        if any(later < earlier for earlier, later in zip(request.timestamps, request.timestamps[1:], strict=False)):
            raise InputError("timestamps fall within the events", fix="sort the events by time, oldest first")
        config = self.bundle.config
        histories, _ = encode_requests([request], config, self.bundle.vocabulary, max_events=config.max_history)
        return EventRows(item_ids=histories.item_ids, actions=histories.actions, timestamps=histories.timestamps)

    def _item(self, raw: str | int) -> int:
        encoded = self.bundle.vocabulary.encode_item(raw)
        if encoded == 0:
            raise InputError(f"unknown item {raw!r}", fix="leave out items the model was not trained on")
        return encoded

    def _allowed(self, filters: Filters, history: EventRows) -> Callable[[Array], Array]:
        """A mask bool [n] of item ids int64 [n]."""
        excluded = [self._item(raw) for raw in filters.exclude_items]
        only = None if filters.only_items is None else [self._item(raw) for raw in filters.only_items]

        def mask(item_ids: Array) -> Array:
            keep = np.ones(len(item_ids), np.bool_)
            if filters.exclude_seen:
                keep &= ~np.isin(item_ids, history.item_ids)
            if excluded:
                keep &= ~np.isin(item_ids, excluded)
            if only is not None:
                keep &= np.isin(item_ids, only)
            return keep

        return mask

    def _weighted(self, tasks: Array, weights: TaskWeights) -> Array:
        values = np.array([getattr(weights, name, 1.0) for name in self.bundle.config.tasks], np.float32)
        total = float(values.sum())
        shares = values / total if total else np.full(len(values), 1.0 / len(values), np.float32)
        return np.asarray(tasks @ shares)

    async def _prefetch(self) -> None:
        """States of users expected back are moved up, in the engine's thread."""
        loop = asyncio.get_running_loop()
        executor = self.runtimes.lanes[self.runtimes.order[0]].executor
        while True:
            await asyncio.sleep(_PREFETCH_EVERY_S)
            await loop.run_in_executor(executor, lambda: self.cache.prefetch(time.time()))


def _visit(request: RecommendRequest | ScoreRequest, rows: EventRows, log: UserLog | None) -> Visit:
    return Visit(
        history=rows.histories(request.query_timestamp or 0),
        user_id=request.user_id if log is not None else None,
        log=log,
        query_time=request.query_timestamp or 0,
    )
