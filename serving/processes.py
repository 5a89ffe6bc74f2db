"""A worker process under care: started, asked, watched, and started again when it dies."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hstu.errors import CompilerError, InputError
from serving.batching import BusyError
from serving.engine import Array
from serving.fallback import LOG, Fallback
from serving.frames import encode, receive

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_STARTS_WITHIN_S = 120.0
_RETRY_AFTER_S = 1.0


class WorkerDownError(ConnectionError):
    """The worker is not there, or went away while it was asked."""


class Worker:
    """One process of `serving.worker`. A request to it while it is down fails at once."""

    def __init__(
        self,
        role: str,
        bundle: Path,
        *,
        engine: str | None = None,
        threads: int | None = None,
        max_waiting: int = 256,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.role = role
        self.restarts = 0
        self.refused = 0
        self.precision = ""
        self.fallback: Fallback | None = None  # when its engine stands in for another
        self.on_ready: Callable[[], None] = lambda: None
        self._max_waiting = max_waiting
        self._arguments = [role, str(bundle)]
        self._details = json.dumps({"engine": engine, "options": dict(options or {})})
        self._environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Array]]] = {}
        self._numbers = itertools.count()
        self._ready = asyncio.Event()
        self._care: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self, *, wait_s: float = _STARTS_WITHIN_S) -> None:
        """The process is under care; returns when it is ready. WorkerDownError when that takes longer."""
        self._care = asyncio.create_task(self._keep_up(), name=f"worker {self.role}")
        try:
            async with asyncio.timeout(wait_s):
                await self._ready.wait()
        except TimeoutError:
            raise WorkerDownError(f"the {self.role} worker did not start within {wait_s:.0f} s") from None

    async def ask(self, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The worker's answer; WorkerDownError when it is down or goes down meanwhile, BusyError when too many wait,
        InputError as it says."""
        if self._writer is None or not self.ready:
            raise WorkerDownError(f"the {self.role} worker is down")
        if len(self._answers) >= self._max_waiting:
            self.refused += 1
            raise BusyError(f"the {self.role} worker", _RETRY_AFTER_S)
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Array]] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        try:
            self._writer.write(encode({**header, "id": number}, arrays))
            await self._writer.drain()
            return await future
        finally:
            self._answers.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # seen: where writing failed nobody waited for it

    async def close(self) -> None:
        """The process has ended."""
        if self._care is not None:
            self._care.cancel()
            await asyncio.gather(self._care, return_exceptions=True)
        await self._end()

    async def _keep_up(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            try:
                reader = await self._spawn()
                header, _ = await receive(reader)
                self.precision, self.fallback = header["precision"], _fallback(header["fallback"])
                self._ready.set()
                self.on_ready()
                LOG.info("the %s worker is ready", self.role)
                pause = _FIRST_PAUSE_S
                await self._read(reader)
            except (asyncio.IncompleteReadError, ConnectionError, OSError):
                pass  # it died: below
            await self._end()
            self.restarts += 1
            LOG.warning("the %s worker is down and will be started again", self.role)
            await asyncio.sleep(pause)
            pause = min(2.0 * pause, _LONGEST_PAUSE_S)

    async def _spawn(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                f"{__package__}.worker",
                *self._arguments,
                str(theirs.fileno()),
                self._details,
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                env={**os.environ, **self._environment},
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        return reader

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            header, arrays = await receive(reader)
            future = self._answers.get(header["id"])
            if future is None or future.done():
                continue  # whoever asked has given up
            if "error" in header:
                kind = InputError if header["kind"] == "input" else CompilerError
                future.set_exception(kind(header["error"]))
            else:
                future.set_result(arrays)

    async def _end(self) -> None:
        self._ready.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for future in self._answers.values():
            if not future.done():
                future.set_exception(WorkerDownError(f"the {self.role} worker went down"))
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._process = None


def _fallback(found: Mapping[str, Any] | None) -> Fallback | None:
    return None if found is None else Fallback(**found)
