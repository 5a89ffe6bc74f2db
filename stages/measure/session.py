"""One case, all its cells: opens the runtimes, measures, closes them; the matrix products take turns with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hstu.config import HSTUConfig
from stages.machine import num_cores
from stages.measure.cases import BenchmarkEntry, Case, Cell, ThreadMode, cells
from stages.measure.contestants import EAGER, GEMM, Contestant, takes_part
from stages.measure.interleave import Effort, Found, measure_cell
from stages.measure.rows import result_rows
from stages.measure.scaling import measure_scaling
from stages.measure.worker import Worker, WorkerError

Mode = ThreadMode | Literal["scaling"]
GROUPS: tuple[tuple[BenchmarkEntry, ...], ...] = (
    ("retrieve", "rank"),
    ("extend",),  # compiled when it is first asked for, so that what the others take is known without it
    ("generate",),
)  # runtimes up at the same time


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What of a case is measured; empty: all of it."""

    entries: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    occupancies: tuple[float, ...] = ()
    leave_out: tuple[str, ...] = ()  # runtimes, as their rows begin: "torch-compile", "engine onnxruntime fp16"

    def wants(self, cell: Cell) -> bool:
        """Whether a cell is measured."""
        return all(
            not wanted or value in wanted
            for value, wanted in (
                (cell.entry, self.entries),
                (cell.batch, self.batches),
                (cell.occupancy, self.occupancies),
            )
        )


@dataclass(kw_only=True, slots=True)
class Session:
    """Measures one case; `rows`, `scaling` and `skipped` are parts of benchmark.json and fill up meanwhile.

    The first contestant is eager PyTorch. `on_cell` hears of each finished cell. A peer that cannot run here
    (no compiler, no vLLM) goes to `skipped` with the reason; what any other runtime raises is raised.
    """

    case: Case
    config: HSTUConfig
    contestants: Sequence[Contestant]
    effort: Effort
    seed: int
    on_cell: Callable[[Found], None]
    choice: Choice = Choice()
    rows: list[dict[str, Any]] = field(default_factory=list)
    scaling: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    calibration_ms: list[float] = field(default_factory=list)
    baselines_mib: dict[Contestant, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        left_out = [c for c in self.contestants[1:] if str(c) in self.choice.leave_out]
        self.contestants = [c for c in self.contestants if c not in left_out]
        self.skipped += [self._reason(c, "left out (benchmark.leave_out)") for c in left_out]

    def measure(self, mode: Mode) -> None:
        """Every cell on one thread or on all; or what all threads are worth, side by side."""
        if mode == "scaling":
            self._measure_scaling()
            return
        for group in GROUPS:
            entries = {entry for c in self.contestants[1:] for entry in c.entries(self.config)} & set(group)
            wanted = [cell for cell in cells(self.case, self.config, entries, mode) if self.choice.wants(cell)]
            contestants = [c for c in self.contestants if any(self._takes_part(c, cell) for cell in wanted)]
            if wanted:
                with self.opened(contestants, threads=_threads(mode)) as (workers, roof):
                    self._measure_group(workers, roof, wanted, mode)

    def _takes_part(self, contestant: Contestant, cell: Cell) -> bool:
        return takes_part(contestant, self.config, cell, self.effort.compiling)

    def _measure_group(self, workers: list[Worker], roof: Worker, wanted: Sequence[Cell], mode: ThreadMode) -> None:
        rng = np.random.default_rng([self.seed, len(self.rows)])
        self.calibration_ms.append(roof.call("calibration_ms"))
        weights_bytes = (self.contestants[0].checkpoint / "model.safetensors").stat().st_size
        for cell in wanted:
            able = [worker for worker in workers if self._takes_part(worker.contestant, cell)]
            found = measure_cell(able, roof, self.config, self.case, cell, self.effort, rng)
            for worker in [worker for worker in workers if worker.contestant in found.broken]:
                self.skip(worker, found.broken[worker.contestant])
                workers.remove(worker)
            self.on_cell(found)
            self.rows += result_rows(
                found,
                self.config,
                threads=_threads(mode),
                weights_bytes=weights_bytes,
                baselines_mib=self.baselines_mib,
            )

    def _measure_scaling(self) -> None:
        (cell, *_) = cells(self.case, self.config, ("retrieve",), "one")
        if num_cores() == 1 or not self.choice.wants(cell):
            return
        able = [c for c in self.contestants if c.runtime == "engine" or (c.runtime == EAGER and c.precision == "fp32")]
        rng = np.random.default_rng([self.seed, len(self.scaling)])
        with self.opened(able, threads=1) as (one, roof), self.opened(able, threads=num_cores()) as (all_, _):
            self.calibration_ms.append(roof.call("calibration_ms"))
            pairs = list(zip(one, all_, strict=True))
            self.scaling += measure_scaling(pairs, self.config, self.case, cell, self.effort, rng, threads=num_cores())

    @contextlib.contextmanager
    def opened(self, contestants: Sequence[Contestant], threads: int) -> Iterator[tuple[list[Worker], Worker]]:
        """Workers of all contestants that can run here, and one for the matrix products, loaded at the same time."""
        checkpoint = self.contestants[0].checkpoint
        products = Contestant(runtime=GEMM, backend="any", precision="any", folder=checkpoint, checkpoint=checkpoint)
        with contextlib.ExitStack() as stack:
            workers = []
            for contestant in [products, *contestants]:
                workers.append(Worker(contestant, threads=threads))
                stack.callback(workers[-1].close)
            ready = []
            for worker in workers:
                try:
                    opened = worker.receive(timeout_s=self.effort.first_answer_s)
                except WorkerError as error:
                    self.skip(worker, error)
                else:
                    self.baselines_mib[worker.contestant] = opened["baseline_mib"]
                    ready.append(worker)
            yield ready[1:], ready[0]

    def skip(self, worker: Worker, error: WorkerError) -> None:
        """Leave a runtime out that broke down, and say why; raises what it raised when it is not optional."""
        if not worker.contestant.optional:
            raise error
        worker.close()
        self.skipped.append(self._reason(worker.contestant, str(error)))

    def _reason(self, contestant: Contestant, reason: str) -> dict[str, str]:
        return {
            "case": self.case.name,
            "runtime": contestant.runtime,
            "backend": contestant.backend,
            "precision": contestant.precision,
            "reason": reason,
        }


def _threads(mode: ThreadMode) -> int:
    return 1 if mode == "one" else num_cores()
