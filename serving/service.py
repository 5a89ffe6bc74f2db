"""The recommender as a service: one request in, one answer out, whatever has to be asked, fallen back to or kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hstu.data.histories import Histories
from hstu.errors import ArtifactError, InputError, MissingBackendError, UsageError
from hstu.signature import CacheForm
from serving.bundle import Bundle
from serving.cache import HotCache
from serving.engine import Array, check_feeds
from serving.engine_order import TORCH
from serving.fallback import LOG, Breaker, Chain, Choice, Fallback
from serving.items import EMBEDDING_CODEC, ItemEmbeddings
from serving.lanes import Lane, lane_order, opener
from serving.processes import Worker, WorkerDownError
from serving.requests import encode_requests
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
from serving.users import STATE_CODEC, EventRows, UserLog, UserLogs, event_rows
from serving.visits import Found, Visit, feeds_for_rank, state_key

_COST_SHARE = 0.5  # of the deadline that a strategy chosen by `auto` may be expected to take
_WORKER_SHARE = 0.8  # of the time left that a worker may take: somebody else needs the rest if it hangs
_PREFETCH_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSettings:
    """How a bundle is served."""

    engine: str | None = None  # None: the bundle's choice
    state_form: CacheForm = "fp32"
    vllm: bool = False  # whether the process that generates slates is started
    ranker: bool = True  # whether the process that ranks is started
    strict: bool = False  # no fallback at any level
    deadline_ms: int = 1000  # of requests that give none
    max_batch: int = 32
    batch_wait_ms: float = 2.0
    max_queue: int = 256
    cache_mib: int = 256
    device_share: float = 0.5
    disk: Path | None = None
    disk_mib: int = 0
    max_users: int = 100_000
    threads: int | None = None


class Service:
    """A bundle, its runtimes, its known users and the cache of their states."""

    def __init__(self, bundle: Bundle, settings: ServiceSettings) -> None:
        self.bundle, self.settings = bundle, settings
        memory = settings.cache_mib << 20
        self.cache = HotCache(
            {"user": STATE_CODEC, "item": EMBEDDING_CODEC},
            memory_bytes=memory,
            device_bytes=int(memory * settings.device_share),
            disk=settings.disk,
            disk_bytes=settings.disk_mib << 20,
        )
        self.users = UserLogs(max_users=settings.max_users, max_events=bundle.config.max_history)
        self.chain = Chain(strict=settings.strict)
        bundle.engine_folder(settings.engine)  # names the known ones when there is no such engine
        self.order = lane_order(bundle, settings.engine)
        self.lanes = {
            name: Lane(
                name,
                opener(bundle, name, settings.state_form, settings.threads),
                self.cache,
                max_batch=settings.max_batch,
                wait_s=settings.batch_wait_ms / 1e3,
                max_queue=settings.max_queue,
            )
            for name in self.order
        }
        self.workers: dict[str, Worker] = {}
        if settings.ranker and bundle.config.tasks:
            self.workers["ranker"] = Worker("ranker", bundle.path, engine=settings.engine, threads=settings.threads)
        if settings.vllm:
            self.workers["slates"] = Worker("slates", bundle.path, threads=settings.threads)
        self.breakers = {name: Breaker(f"the {name} worker") for name in ("ranker", "slates")}
        self.seconds = {"engine": 0.005, "unified": 0.02, "vllm": 0.2, "torch": 0.02}  # measured as answers are made
        self._items = ItemEmbeddings(bundle.path, self.cache)
        items = bundle.vocabulary.items
        self._integer_ids = all(item.isascii() and item.isdigit() and item == str(int(item)) for item in items)
        self._prefetching: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether an engine answers."""
        return any(self.lanes[name].stateful is not None for name in self.order)

    async def start(self) -> None:
        """The engine is open and has answered once; workers are up, or starting under care."""
        await asyncio.gather(*(self._start_worker(name) for name in self.workers))
        await self._open_lanes()
        await self._warm_up()
        self._prefetching = asyncio.create_task(self._prefetch(), name="prefetch")
        LOG.info("serving bundle %s with %s", self.bundle.artifact.id[:12], " → ".join(self.order))

    async def _start_worker(self, name: str) -> None:
        """The worker answers; or it is down, and others answer for it until it does; with `strict` an error."""
        try:
            await self.workers[name].start()
        except WorkerDownError as error:
            if self.settings.strict:
                raise
            self.breakers[name].failed(error, at_once=True)

    async def _open_lanes(self) -> None:
        """Every engine that may be asked is open: a fallback has no time to load a model.

        One that cannot run here is down, as answers will say; when it was asked for by name, or with `strict`, that
        is an error.
        """
        for place, name in enumerate(self.order[: 1 if self.settings.strict else None]):
            try:
                await self.lanes[name].open()
            except (MissingBackendError, ArtifactError) as error:
                if self.settings.strict or name == self.order[-1] or (place == 0 and self.settings.engine is not None):
                    raise
                self.lanes[name].breaker.failed(error, at_once=True)

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
            await self._retrieve(visit, time.monotonic() + 60.0)
        visit, count = Visit(history=events.histories(0)), min(8, self.settings.max_queue)
        warm = [self._retrieve(visit, time.monotonic() + 60.0) for _ in range(count)]
        await asyncio.gather(*warm)
        self.delete_user(user_id)

    async def close(self) -> None:
        """Everything that was started has ended."""
        if self._prefetching is not None:
            self._prefetching.cancel()
        await asyncio.gather(*(worker.close() for worker in self.workers.values()))
        for lane in self.lanes.values():
            await lane.close()

    async def recommend(self, request: RecommendRequest, *, arrived: float | None = None) -> RecommendAnswer:
        """The answer; InputError for what is wrong with the request, BusyError, LateError or UnavailableError."""
        began = time.monotonic() if arrived is None else arrived
        deadline = began + (request.deadline_ms or self.settings.deadline_ms) / 1e3
        rows, log = self._history(request.user_id, request.events)
        allowed = self._allowed(request.filters, rows)
        strategy = self._strategy(request, deadline - time.monotonic())
        visit = Visit(
            history=rows.histories(request.query_timestamp or 0),
            user_id=request.user_id if log is not None else None,
            log=log,
            query_time=request.query_timestamp or 0,
        )
        fallbacks: list[Fallback] = []
        found: Found | None = None
        waited = compute = 0.0
        precision: str | None = "fp32"
        if strategy == "vllm" or (strategy == "unified" and request.candidates_from == "vllm"):
            item_ids, scores, found, runtime, waited, fallbacks = await self._generate(visit, request.k, deadline)
        else:
            order = [TORCH] if strategy == "torch" else self.order
            found, waited, runtime, fallbacks = await self._retrieve(visit, deadline, order=order)
            item_ids, scores = found.item_ids, found.scores
        if found is not None:
            compute, precision = found.compute_s, self.precision(runtime)
        keep = allowed(item_ids)
        item_ids, scores = item_ids[keep], scores[keep]
        tasks: Array | None = None
        ranker = None
        if strategy == "unified" and len(item_ids):
            tasks, ranker, fell = await self._rank_or_not(visit.history, item_ids, deadline)
            fallbacks = fallbacks + fell
            if tasks is not None:
                scores = self._weighted(tasks, request.task_weights)
                order_by = np.argsort(-scores, kind="stable")
                item_ids, scores, tasks = item_ids[order_by], scores[order_by], tasks[order_by]
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
        served = self._served(strategy, runtime, precision or "fp32", found, waited, compute, took, fallbacks, ranker)
        return RecommendAnswer.model_validate({"user_id": request.user_id, "items": items, "served": served})

    async def score(self, request: ScoreRequest, *, arrived: float | None = None) -> ScoreAnswer:
        """Each candidate's probability per task, by the ranker, or by eager PyTorch when that is down."""
        config = self.bundle.config
        if not config.tasks:
            raise InputError("this model has no task heads", fix="serve a bundle whose checkpoint has tasks")
        began = time.monotonic() if arrived is None else arrived
        deadline = began + (request.deadline_ms or self.settings.deadline_ms) / 1e3
        rows, log = self._history(request.user_id, request.events)
        history = rows.histories(request.query_timestamp or 0)
        candidates = np.array([self._item(raw) for raw in request.candidates], np.int64)
        choices = [Choice(TORCH, self.lanes[TORCH].breaker, partial(self._rank_torch, history, candidates))]
        if "ranker" in self.workers:
            choices.insert(0, Choice("ranker", self.breakers["ranker"], partial(self._rank, history, candidates)))
        tasks, ranker, fallbacks = await self.chain.ask("engine", choices, deadline=deadline)
        similarity: Array | None = None
        found: Found | None = None
        waited = 0.0
        runtime = ranker
        if request.similarity:
            visit = Visit(history=history, user_id=request.user_id if log else None, log=log,
                          query_time=request.query_timestamp or 0)  # fmt: skip
            found, waited, runtime, more = await self._retrieve(visit, deadline)
            fallbacks = fallbacks + more
            similarity = self._items.rows(candidates.tolist()) @ found.embedding
        items = [
            {
                "item_id": self.raw_item(int(item)),
                "tasks": dict(zip(config.tasks, map(float, tasks[place]), strict=True)),
                "similarity": None if similarity is None else float(similarity[place]),
            }
            for place, item in enumerate(candidates)
        ]
        took = time.monotonic() - began
        precision = self.workers["ranker"].precision if ranker == "ranker" else "fp32"
        served = self._served("engine", runtime, precision, found, waited, 0.0, took, fallbacks, ranker)
        return ScoreAnswer.model_validate({"user_id": request.user_id, "items": items, "served": served})

    def add_events(self, user_id: str, events: Sequence[Event]) -> int:
        """How many events the user has, all told, these among them."""
        return self.users.append(user_id, self._encode(user_id, list(events))).total

    def delete_user(self, user_id: str) -> bool:
        """Nothing is known of the user any more; whether anything was."""
        known = self.users.delete(user_id)
        dropped = [self.cache.drop("user", state_key(name, user_id)) for name in self.order]
        return known or any(dropped)

    def precision(self, runtime: str) -> str:
        """Of a lane by name."""
        lane = self.lanes.get(runtime)
        return lane.stateful.engine.precision if lane is not None and lane.stateful is not None else "fp32"

    def raw_item(self, model_id: int) -> str | int:
        """The raw id as the log had it: a number where every raw id is one."""
        raw = self.bundle.vocabulary.item(model_id)
        return int(raw) if self._integer_ids else raw

    def _served(
        self,
        strategy: str,
        runtime: str,
        precision: str,
        found: Found | None,
        waited: float,
        compute: float,
        took: float,
        fallbacks: Sequence[Fallback],
        ranker: str | None,
    ) -> dict[str, Any]:
        timing = {"queue_ms": waited * 1e3, "compute_ms": compute * 1e3, "total_ms": took * 1e3}
        return {
            "strategy": strategy,
            "runtime": runtime,
            "precision": precision,
            "ranker": ranker,
            "cache": "none" if found is None else found.cache,
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
        ranker = self.workers.get("ranker")
        affordable = self.seconds["unified"] <= _COST_SHARE * left_s
        return "unified" if ranker is not None and ranker.ready and affordable else "engine"

    def _history(self, user_id: str | None, events: Sequence[Event] | None) -> tuple[EventRows, UserLog | None]:
        if events is not None:
            return self._encode(user_id, list(events)), None
        if user_id is None:
            raise InputError("neither events nor a user", expected="events, or the user_id of a known user")
        log = self.users.get(user_id)
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

    async def _retrieve(
        self, visit: Visit, deadline: float, *, order: Sequence[str] | None = None
    ) -> tuple[Found, float, str, list[Fallback]]:
        lanes = [self.lanes[name] for name in (self.order if order is None else order)]
        choices = [Choice(lane.name, lane.breaker, partial(lane.ask, visit)) for lane in lanes]
        (found, waited), runtime, fallbacks = await self.chain.ask("engine", choices, deadline=deadline)
        return found, waited, runtime, fallbacks

    async def _generate(
        self, visit: Visit, num_items: int, deadline: float
    ) -> tuple[Array, Array, Found | None, str, float, list[Fallback]]:
        """A slate by vLLM, or what the engine retrieves when that is down."""
        if num_items > self.bundle.config.max_generated:
            limit = self.bundle.config.max_generated
            raise InputError("a slate cannot be that long", got=num_items, expected=f"1..{limit}")
        if "slates" not in self.workers:
            self.breakers["slates"].failed(UsageError("it was not started (serve --vllm)"), at_once=True)

        async def by_vllm(until: float) -> tuple[Array, Array, Found | None, str, float, list[Fallback]]:
            arrays = {name: getattr(visit.history, name) for name in ("item_ids", "actions", "timestamps")}
            arrays["query_time"] = self._query_time(visit.history)
            async with asyncio.timeout(_WORKER_SHARE * max(until - time.monotonic(), 0.0)):
                answer = await self.workers["slates"].ask({"num_items": num_items}, arrays)
            return answer["item_ids"], answer["scores"], None, "vllm", 0.0, []

        async def by_engine(until: float) -> tuple[Array, Array, Found | None, str, float, list[Fallback]]:
            found, waited, runtime, fell = await self._retrieve(visit, until)
            return found.item_ids, found.scores, found, runtime, waited, fell

        choices = [
            Choice("vllm", self.breakers["slates"], by_vllm),
            Choice("engine", Breaker("the engine, for generation"), by_engine),
        ]
        answer, _, fallbacks = await self.chain.ask("generation", choices, deadline=deadline)
        return (*answer[:5], fallbacks + answer[5])

    def _query_time(self, history: Histories) -> Array:
        return history.feeds(self.bundle.config)["query_time"]

    async def _rank_or_not(
        self, history: Histories, item_ids: Array, deadline: float
    ) -> tuple[Array | None, str | None, list[Fallback]]:
        """Task probabilities float32 [C, tasks] by the ranker; None when it is down."""

        async def unranked(_: float) -> None:
            return None

        async def ranked(until: float) -> Array | None:
            return await self._rank(history, item_ids, until)

        choices: list[Choice[Array | None]] = [
            Choice("ranker", self.breakers["ranker"], ranked),
            Choice("unranked", Breaker("unranked"), unranked),
        ]
        if "ranker" not in self.workers:
            self.breakers["ranker"].failed(UsageError("it was not started"), at_once=True)
        tasks, used, fallbacks = await self.chain.ask("ranking", choices, deadline=deadline)
        return tasks, None if used == "unranked" else used, fallbacks

    async def _rank(self, history: Histories, candidates: Array, until: float) -> Array:
        feeds = feeds_for_rank(history, candidates, self.bundle.config)
        async with asyncio.timeout(_WORKER_SHARE * max(until - time.monotonic(), 0.0)):
            answer = await self.workers["ranker"].ask({}, feeds)
        return np.asarray(answer["task_scores"][0])

    async def _rank_torch(self, history: Histories, candidates: Array, _: float) -> Array:
        lane = self.lanes[TORCH]
        stateful = await lane.open()
        feeds = feeds_for_rank(history, candidates, self.bundle.config)
        check_feeds(stateful.engine.config, "rank", feeds)
        answer = await lane.run(lambda: stateful.engine.run("rank", feeds))
        return np.asarray(answer["task_scores"][0])

    def _weighted(self, tasks: Array, weights: TaskWeights) -> Array:
        values = np.array([getattr(weights, name, 1.0) for name in self.bundle.config.tasks], np.float32)
        total = float(values.sum())
        shares = values / total if total else np.full(len(values), 1.0 / len(values), np.float32)
        return np.asarray(tasks @ shares)

    async def _prefetch(self) -> None:
        """States of users expected back are moved up, in the engine's thread."""
        loop = asyncio.get_running_loop()
        executor = self.lanes[self.order[0]].executor
        while True:
            await asyncio.sleep(_PREFETCH_EVERY_S)
            await loop.run_in_executor(executor, lambda: self.cache.prefetch(time.time()))
