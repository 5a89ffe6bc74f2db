"""Requests that arrive together are computed together, none waits longer than it must, and none past its deadline."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from hstu.errors import CompilerError

X = TypeVar("X")
Y = TypeVar("Y")
_LONGEST_GAP_S = 1.0  # a pause of the night counts as this


class BusyError(CompilerError):
    """The queue is full; `retry_after_s` says when there may be room."""

    def __init__(self, name: str, retry_after_s: float) -> None:
        super().__init__(f"{name} has more to do than it may queue", fix=f"ask again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class LateError(CompilerError):
    """The deadline passed before there was an answer."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: the deadline has passed", fix="give a later deadline_ms, or ask a quieter server")


@dataclass(slots=True)
class _Waiting(Generic[X, Y]):
    request: X
    deadline: float  # of time.monotonic
    arrived: float
    future: asyncio.Future[tuple[Y, float]]


@dataclass(kw_only=True, slots=True)
class BatcherStats:
    """Since the start: batches by size, refused and late requests, and the mean seconds a request takes."""

    batches: dict[int, int] = field(default_factory=dict)
    refused: int = 0
    late: int = 0
    seconds_per_request: float = 0.005


class Batcher(Generic[X, Y]):
    """Answers requests by `compute`, a call in `executor` for up to `max_batch` of them, the first in line first.

    A request that finds the line empty waits at most `wait_s` for company, where requests come that often; while a
    batch is computed the next one gathers. At most `max_queue` wait. `compute` gives an answer or an exception for
    every request, in order.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[[Sequence[X]], Sequence[Y | Exception]],
        executor: Executor,
        *,
        max_batch: int = 32,
        wait_s: float = 0.002,
        max_queue: int = 512,
    ) -> None:
        self.name = name
        self.stats = BatcherStats()
        self._compute, self._executor = compute, executor
        self._max_batch, self._wait_s, self._max_queue = max_batch, wait_s, max_queue
        self._line: deque[_Waiting[X, Y]] = deque()
        self._arrived = asyncio.Event()
        self._gap_s, self._last = 0.0, 0.0  # running mean time between requests, and when the last one came
        self._task: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._line)

    def retry_after_s(self) -> float:
        """How long what waits now will take."""
        return max(0.1, len(self._line) * self.stats.seconds_per_request)

    async def ask(self, request: X, *, deadline: float) -> tuple[Y, float]:
        """The answer, and the seconds it waited in line; BusyError at once when the line is full, LateError when
        the deadline (of time.monotonic) passes first."""
        now = time.monotonic()
        if len(self._line) >= self._max_queue:
            self.stats.refused += 1
            raise BusyError(self.name, self.retry_after_s())
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"batcher {self.name}")
        self._gap_s += 0.2 * (min(now - self._last, _LONGEST_GAP_S) - self._gap_s) if self._last else 0.0
        self._last = now
        future: asyncio.Future[tuple[Y, float]] = asyncio.get_running_loop().create_future()
        self._line.append(_Waiting(request, deadline, now, future))
        self._arrived.set()
        try:
            async with asyncio.timeout(max(deadline - now, 0.0)):
                return await future
        except TimeoutError:
            self.stats.late += 1
            raise LateError(self.name) from None

    async def close(self) -> None:
        """Nothing is computed any more; who still waits is told."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._line:
            if not waiting.future.done():
                waiting.future.set_exception(LateError(f"{self.name} is closing"))
        self._line.clear()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._line:
                self._arrived.clear()
                await self._arrived.wait()
                await self._company()
            batch = self._next()
            if not batch:
                continue
            began = time.monotonic()
            try:
                answers = await loop.run_in_executor(self._executor, self._compute, [one.request for one in batch])
            except asyncio.CancelledError:
                raise
            except Exception as error:
                answers = [error] * len(batch)
            took = (time.monotonic() - began) / len(batch)
            self.stats.seconds_per_request += 0.1 * (took - self.stats.seconds_per_request)
            self.stats.batches[len(batch)] = self.stats.batches.get(len(batch), 0) + 1
            for one, answer in zip(batch, answers, strict=True):
                if one.future.done():
                    continue
                if isinstance(answer, Exception):
                    one.future.set_exception(answer)
                else:
                    one.future.set_result((answer, began - one.arrived))

    async def _company(self) -> None:
        """Others had a moment to join, unless the batch is full, the first one has no time, or nobody is expected."""
        if self._gap_s > self._wait_s:
            return
        until = min(self._line[0].arrived + self._wait_s, self._line[0].deadline)
        while len(self._line) < self._max_batch and (left := until - time.monotonic()) > 0:
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _next(self) -> list[_Waiting[X, Y]]:
        """The next batch; who has given up is passed over."""
        batch: list[_Waiting[X, Y]] = []
        while self._line and len(batch) < self._max_batch:
            one = self._line.popleft()
            if not one.future.done():
                batch.append(one)
        return batch
