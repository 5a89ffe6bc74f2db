"""An engine with its own thread and its own line of requests, opened when it is first needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from hstu.signature import CacheForm
from serving.batching import Batcher
from serving.bundle import Bundle
from serving.cache import HotCache
from serving.engine import Array
from serving.engine_order import TORCH
from serving.fallback import Breaker
from serving.user_state import Origin, StatefulEngine, open_stateful
from serving.visits import Found, Visit, Visits


class Lane:
    """One runtime of the engine level: `name` is an engine of the bundle, or torch."""

    def __init__(
        self,
        name: str,
        open_it: Callable[[], StatefulEngine],
        cache: HotCache,
        *,
        max_batch: int,
        wait_s: float,
        max_queue: int,
    ) -> None:
        self.name = name
        self.breaker = Breaker(f"engine {name}")
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"engine-{name}")
        self._open_it, self._cache = open_it, cache
        self._settings = {"max_batch": max_batch, "max_queue": max_queue}
        self._wait_s = wait_s
        self._opening = asyncio.Lock()
        self.stateful: StatefulEngine | None = None
        self.batcher: Batcher[Visit, Found] | None = None

    async def open(self) -> StatefulEngine:
        """The engine, ready to run."""
        async with self._opening:
            if self.stateful is None:
                loop = asyncio.get_running_loop()
                stateful = await loop.run_in_executor(self.executor, self._open_it)
                visits = Visits(stateful, self._cache)
                self.batcher = Batcher(f"engine {self.name}", visits, self.executor, wait_s=self._wait_s,
                                       **self._settings)  # fmt: skip
                self.stateful = stateful
            return self.stateful

    async def ask(self, visit: Visit, deadline: float) -> tuple[Found, float]:
        """The engine's answer and the seconds it waited in line."""
        if self.batcher is None:
            await self.open()
        assert self.batcher is not None
        return await self.batcher.ask(visit, deadline=deadline)

    async def run(self, compute: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """Something else in the engine's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, compute)

    async def close(self) -> None:
        """The engine is gone, and so is its thread."""
        if self.batcher is not None:
            await self.batcher.close()
        if self.stateful is not None:
            await asyncio.get_running_loop().run_in_executor(self.executor, self.stateful.engine.close)
        self.executor.shutdown(wait=True)


def opener(bundle: Bundle, name: str, form: CacheForm, threads: int | None) -> Callable[[], StatefulEngine]:
    """What opens an engine of the bundle, or its weights in eager PyTorch."""
    if name != TORCH:
        return lambda: open_stateful(bundle, engine=name, form=form, threads=threads)

    def open_torch() -> StatefulEngine:
        from serving.engines.torch import open_torch_engine

        engine = open_torch_engine(bundle.path, threads=threads)
        checkpoint = bundle.artifact.manifest["inputs"]["checkpoint"]
        return StatefulEngine(
            engine=engine, origin=Origin(checkpoint=checkpoint, engine=TORCH, precision=engine.precision), form=form
        )

    return open_torch
