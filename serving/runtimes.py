"""Who answers: the engines with their lines, the worker processes, and what happens when one of them cannot.

Three levels, each a chain of choices (`serving.fallback`): an engine, then the next (`serving.engine_order`);
vLLM for slates, then an engine; the ranker, then eager PyTorch (for scores) or nobody (for an order).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hstu.data.histories import Histories
from hstu.errors import ArtifactError, InputError, MissingBackendError, UsageError
from serving.bundle import Bundle
from serving.cache import HotCache
from serving.engine import Array, check_feeds
from serving.engine_order import TORCH, lane_order
from serving.fallback import Breaker, Chain, Choice, Fallback
from serving.lanes import Lane, opener
from serving.processes import Worker, WorkerDownError
from serving.settings import ServiceSettings
from serving.visits import Found, Visit, feeds_for_rank

_WORKER_SHARE = 0.8  # of the time left that a worker may take: somebody else needs the rest if it hangs


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Items with scores, and who found them: item ids int64 [K], scores float32 [K], best first."""

    item_ids: Array
    scores: Array
    runtime: str  # an engine of the bundle, torch, or vllm
    fallbacks: tuple[Fallback, ...] = ()
    found: Found | None = None  # what the engine gave; None: vLLM
    waited_s: float = 0.0


class Runtimes:
    """The runtimes of one bundle."""

    def __init__(self, bundle: Bundle, settings: ServiceSettings, cache: HotCache) -> None:
        self.bundle, self._settings = bundle, settings
        self.chain = Chain(strict=settings.strict)
        bundle.engine_folder(settings.engine)  # names the known ones when there is no such engine
        self.order = lane_order(bundle, settings.engine)
        self.lanes = {
            name: Lane(
                name,
                opener(bundle, name, settings.state_form, settings.threads),
                cache,
                max_batch=settings.max_batch,
                wait_s=settings.batch_wait_ms / 1e3,
                max_queue=settings.max_queue,
            )
            for name in self.order
        }
        self.workers: dict[str, Worker] = {}
        if settings.ranker and bundle.config.tasks:
            self.workers["ranker"] = Worker(
                "ranker", bundle.path, engine=settings.engine, threads=settings.threads, max_waiting=settings.max_queue
            )
        if settings.vllm:
            self.workers["slates"] = Worker(
                "slates",
                bundle.path,
                threads=settings.threads,
                max_waiting=settings.max_queue,
                options=settings.vllm_options,
            )
        self.breakers = {name: Breaker(f"the {name} worker") for name in ("ranker", "slates")}
        for name, worker in self.workers.items():
            worker.on_ready = self.breakers[name].may_be_back

    @property
    def ready(self) -> bool:
        """Whether an engine answers."""
        return any(self.lanes[name].stateful is not None for name in self.order)

    async def start(self) -> None:
        """Every runtime that can run here is open; workers are up, or starting under care.

        One that cannot is down, as answers will say; when it was asked for by name, or with `strict`, that is an error.
        """
        await asyncio.gather(*(self._start_worker(name) for name in self.workers))
        for place, name in enumerate(self.order[: 1 if self._settings.strict else None]):
            try:
                await self.lanes[name].open()  # all of them: a fallback has no time to load a model
            except (MissingBackendError, ArtifactError) as error:
                asked_for = self._settings.strict or (place == 0 and self._settings.engine is not None)
                if asked_for or name == self.order[-1]:
                    raise
                self.lanes[name].breaker.failed(error, at_once=True)

    async def _start_worker(self, name: str) -> None:
        try:
            await self.workers[name].start()
        except WorkerDownError as error:
            if self._settings.strict:
                raise
            self.breakers[name].failed(error, at_once=True)
        stands_in = self.workers[name].fallback
        if self._settings.strict and stands_in is not None:
            raise MissingBackendError(
                f"the engine {stands_in.wanted} of the {name} cannot run here", got=stands_in.reason,
                fix=f"serve --precision {stands_in.used}, or without --strict",
            )  # fmt: skip

    async def close(self) -> None:
        """Every process and thread has ended."""
        await asyncio.gather(*(worker.close() for worker in self.workers.values()))
        for lane in self.lanes.values():
            await lane.close()

    def precision(self, runtime: str) -> str:
        """Of a lane or a worker by name."""
        if runtime == "ranker":
            return self.workers["ranker"].precision
        lane = self.lanes.get(runtime)
        return lane.stateful.engine.precision if lane is not None and lane.stateful is not None else "fp32"

    async def retrieve(self, visit: Visit, deadline: float, *, order: Sequence[str] | None = None) -> Candidates:
        """What the first engine that can gives for the visit."""
        lanes = [self.lanes[name] for name in (self.order if order is None else order)]
        choices = [Choice(lane.name, lane.breaker, partial(lane.ask, visit)) for lane in lanes]
        (found, waited), runtime, fallbacks = await self.chain.ask("engine", choices, deadline=deadline)
        return Candidates(
            item_ids=found.item_ids,
            scores=found.scores,
            runtime=runtime,
            fallbacks=tuple(fallbacks),
            found=found,
            waited_s=waited,
        )

    async def generate(self, visit: Visit, num_items: int, deadline: float) -> Candidates:
        """A slate by vLLM, or what the engine retrieves when that is down."""
        config = self.bundle.config
        if num_items > config.max_generated:
            raise InputError("a slate cannot be that long", got=num_items, expected=f"1..{config.max_generated}")
        if "slates" not in self.workers:
            self.breakers["slates"].failed(UsageError("it was not started (serve --vllm)"), at_once=True)

        async def by_vllm(until: float) -> Candidates:
            answer = await self._ask_worker("slates", {"num_items": num_items}, _arrays(visit.history), until)
            return Candidates(item_ids=answer["item_ids"], scores=answer["scores"], runtime="vllm")

        choices = [
            Choice("vllm", self.breakers["slates"], by_vllm),
            Choice("engine", Breaker("the engine, for generation"), partial(self.retrieve, visit)),
        ]
        answer, _, fallbacks = await self.chain.ask("generation", choices, deadline=deadline)
        return Candidates(
            item_ids=answer.item_ids,
            scores=answer.scores,
            runtime=answer.runtime,
            fallbacks=(*fallbacks, *answer.fallbacks),
            found=answer.found,
            waited_s=answer.waited_s,
        )

    async def rank_or_not(
        self, history: Histories, item_ids: Array, deadline: float
    ) -> tuple[Array | None, str | None, list[Fallback]]:
        """Task probabilities float32 [C, tasks] by the ranker; None when it is down."""

        async def unranked(_: float) -> None:
            return None

        if "ranker" not in self.workers:
            self.breakers["ranker"].failed(UsageError("it was not started"), at_once=True)
        choices: list[Choice[Array | None]] = [
            Choice("ranker", self.breakers["ranker"], partial(self._rank, history, item_ids)),
            Choice("unranked", Breaker("unranked"), unranked),
        ]
        tasks, used, fallbacks = await self.chain.ask("ranking", choices, deadline=deadline)
        return tasks, None if used == "unranked" else used, fallbacks + self._stand_in(used)

    async def score(self, history: Histories, candidates: Array, deadline: float) -> tuple[Array, str, list[Fallback]]:
        """Task probabilities float32 [C, tasks] by the ranker, or by eager PyTorch when that is down."""
        choices = [Choice(TORCH, self.lanes[TORCH].breaker, partial(self._rank_torch, history, candidates))]
        if "ranker" in self.workers:
            choices.insert(0, Choice("ranker", self.breakers["ranker"], partial(self._rank, history, candidates)))
        tasks, used, fallbacks = await self.chain.ask("engine", choices, deadline=deadline)
        return tasks, used, fallbacks + self._stand_in(used)

    def _stand_in(self, used: str) -> list[Fallback]:
        """What the ranker's engine stands in for, if it is not the one that it should be."""
        fallback = self.workers["ranker"].fallback if used == "ranker" else None
        return [] if fallback is None else [fallback]

    async def _rank(self, history: Histories, candidates: Array, until: float) -> Array:
        arrays = {**_arrays(history), "candidate_ids": np.asarray(candidates, np.int64)}
        return (await self._ask_worker("ranker", {}, arrays, until))["task_scores"]

    async def _rank_torch(self, history: Histories, candidates: Array, _: float) -> Array:
        lane = self.lanes[TORCH]
        stateful = await lane.open()
        feeds = feeds_for_rank(history, candidates, self.bundle.config)
        check_feeds(stateful.engine.config, "rank", feeds)
        return np.asarray((await lane.run(lambda: stateful.engine.run("rank", feeds)))["task_scores"][0])

    async def _ask_worker(
        self, name: str, header: dict[str, int], arrays: dict[str, Array], until: float
    ) -> dict[str, Array]:
        within_s = _WORKER_SHARE * max(until - time.monotonic(), 0.0)
        async with asyncio.timeout(within_s):
            return await self.workers[name].ask({**header, "within_s": within_s}, arrays)


def _arrays(history: Histories) -> dict[str, Array]:
    """One history as a worker takes it."""
    return {name: getattr(history, name) for name in ("item_ids", "actions", "timestamps", "query_time")}
