"""One runtime in one process: it shares no thread pool and no memory with the others, so both can be measured.

All of them keep memory that they have freed (ENVIRONMENT). As glibc is set up otherwise it gives every large tensor
back at once, and the next one is cleared page by page again: that doubles eager PyTorch's time on long histories and
lets it vary by a tenth from process to process, and a ratio to it would measure that.

The parent sends pickled calls over a socket and waits; a worker that nobody calls sleeps. When the parent
ends, however it ends, the socket closes and the worker with it. What a runtime writes goes to a log file.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import stages
from hstu.errors import CompilerError, UsageError
from serving.engine import Array
from stages.measure import process
from stages.measure.cases import BenchmarkEntry
from stages.measure.contestants import Contestant
from stages.measure.gemm import Roof
from stages.measure.requests import Request
from stages.measure.runtimes import CompiledEngine, Eager, Runtime, Vllm, open_runtime, prepare
from stages.measure.statistics import significant

ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
IDLE_SECONDS = 0.1  # a pool that spins longer than this after its work never sleeps at all
LOG_TAIL = 1500  # characters of the log that go into an error message


class WorkerError(CompilerError):
    """A runtime's process ended, or did not answer in time."""


class Worker:
    """The parent's end: starts the process and calls into it. `call` waits for the answer, `send` does not."""

    def __init__(self, contestant: Contestant, *, threads: int) -> None:
        self.contestant = contestant
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        paths = [str(Path(stages.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stages.measure.worker", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs.fileno()],
            env={
                **os.environ,
                **ENVIRONMENT,
                "OMP_NUM_THREADS": str(threads),
                "OPENBLAS_NUM_THREADS": str(threads),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self.threads = threads
        self.open(contestant)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, method: str, *arguments: Any, **options: Any) -> None:
        """Ask for something; `receive` waits for the answer."""
        try:
            self._connection.send((method, arguments, options))
        except OSError:
            raise self._ended() from None

    def open(self, contestant: Contestant) -> None:
        """Ask for another runtime in the place of the one before; `receive` waits until it is loaded."""
        self.contestant = contestant
        self.send("open", contestant, self.threads)

    def receive(self, *, timeout_s: float | None = None) -> Any:
        """The answer to what was sent; raises what the runtime raised of ours.

        WorkerError when the process ended, or has not answered in `timeout_s`: then it is ended.
        """
        try:
            if not self._connection.poll(timeout_s):
                self.close()
                raise WorkerError(f"{self.contestant}: no answer within {timeout_s:g} s")
            reply = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(reply, CompilerError):
            raise reply
        return reply

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """The answer to one call, however long it takes."""
        self.send(method, *arguments, **options)
        return self.receive()

    def close(self) -> None:
        """End the process; a second time nothing happens."""
        self._connection.close()
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _ended(self) -> WorkerError:
        code = self._process.wait()
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace")[-LOG_TAIL:]
        return WorkerError(f"{self.contestant}: its process ended (exit status {code})", got=tail.strip())


class Seat:
    """The worker's end: the methods that the parent may call."""

    def __init__(self) -> None:
        self.runtime: Runtime | Roof | None = None
        self.baseline_mib = 0.0

    def open(self, contestant: Contestant, threads: int) -> dict[str, float]:
        """Load the model; says what the libraries alone take and how long the loading took."""
        self.runtime = None  # the one before goes first
        prepare(contestant, threads)
        self.baseline_mib = process.resident_mib()
        started = time.perf_counter()
        self.runtime = open_runtime(contestant, threads)
        return {"baseline_mib": self.baseline_mib, "open_s": significant(time.perf_counter() - started)}

    def answer(self, entry: BenchmarkEntry, request: Request) -> dict[str, Any]:
        """The outputs of one request."""
        return dict(self._model().answer(entry, request))

    def time(
        self, entry: BenchmarkEntry, requests: Sequence[Request], *, wake: bool, slower: float = 0.0
    ) -> tuple[list[float], float]:
        """Seconds of each request, and those its threads waited for a core meanwhile, together.

        With `wake` the first request is answered once before, to bring back caches and threads. The turn ends
        when all threads sleep. `slower` burns that share more processor time after every answer.
        """
        runtime = self._model()
        if wake:
            runtime.answer(entry, requests[0])
        seconds = []
        waited_before = process.core_wait_s()
        for request in requests:
            if isinstance(runtime, Vllm) or (entry == "extend" and isinstance(runtime, CompiledEngine)):
                runtime.remember(request)  # the visit before; of vLLM nothing else may be in its pages
            started, used = time.perf_counter(), time.process_time()
            runtime.answer(entry, request)
            if slower:
                end = time.process_time() + slower * (time.process_time() - used)
                while time.process_time() < end:
                    pass
            seconds.append(time.perf_counter() - started)
        waited = process.core_wait_s() - waited_before
        process.wait_until_idle(IDLE_SECONDS)
        return seconds, waited

    def slate_error(self, request: Request, slates: Array) -> float:
        """How far any item of these slates stands below the best choice, by eager PyTorch."""
        if not isinstance(self.runtime, Eager):
            raise UsageError("slates are judged by eager PyTorch alone")
        return self.runtime.slate_error(request, slates)

    def settle(self) -> None:
        """What loading and compiling left behind is given back, and the most memory is looked for anew."""
        process.give_back_memory()
        process.reset_peak()

    def peak_mib(self) -> float:
        """The most memory since `settle`, less what the libraries took before the model was loaded."""
        return process.peak_mib() - self.baseline_mib

    def gflops(self) -> tuple[dict[str, float], dict[str, str]]:
        """The rates of the fastest matrix products now, and which they are; see `stages.measure.gemm`."""
        roof = self.runtime
        if not isinstance(roof, Roof):
            raise UsageError("matrix products are measured by a process of their own")
        return roof.gflops(), roof.products()

    def calibration_ms(self) -> float:
        """See `stages.measure.ceiling`."""
        from stages.measure.ceiling import calibration_ms

        return calibration_ms()

    def fixed_work_s(self) -> float:
        """See `stages.measure.ceiling`, without what this process waited for a core."""
        from stages.measure.ceiling import fixed_work

        waited, started = process.core_wait_s(), time.perf_counter()
        fixed_work()
        taken = time.perf_counter() - started
        return max(taken - (process.core_wait_s() - waited), 1e-9)

    def _model(self) -> Runtime:
        if self.runtime is None or isinstance(self.runtime, Roof):
            raise UsageError("matrix products answer no requests")
        return self.runtime


def serve(connection: Connection) -> None:
    """Answer calls until the parent closes the connection."""
    seat = Seat()
    while True:
        try:
            method, arguments, options = connection.recv()
        except EOFError:
            return
        try:
            reply = getattr(seat, method)(*arguments, **options)
        except CompilerError as error:
            reply = error  # anything else ends this process; the parent shows the end of its log
        connection.send(reply)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
