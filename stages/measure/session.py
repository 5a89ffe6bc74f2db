"""One case, all its cells: opens the runtimes, measures, closes them; the GEMM ceiling is measured around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hstu.config import HSTUConfig
from stages.machine import num_cores
from stages.measure.cases import BenchmarkEntry, Case, Cell, ThreadMode, cells
from stages.measure.interleave import Effort, Measurement, measure_cell
from stages.measure.runtimes import Contestant, takes_part
from stages.measure.statistics import significant
from stages.measure.worker import Worker, WorkerError

CEILING_PRECISIONS = ("fp32", "bf16", "int8")
GROUPS: tuple[tuple[BenchmarkEntry, ...], ...] = (
    ("retrieve", "rank", "extend"),
    ("generate",),
)  # runtimes up at the same time


@dataclass(kw_only=True, slots=True)
class Session:
    """Measures one case; `rows`, `skipped` and `ceilings` are parts of benchmark.json and fill up meanwhile.

    The first contestant is eager PyTorch. `on_cell` hears of each finished cell. A peer that cannot run here
    (no compiler, no vLLM) goes to `skipped` with the reason; what any other runtime raises is raised.
    """

    case: Case
    config: HSTUConfig
    contestants: Sequence[Contestant]
    effort: Effort
    seed: int
    on_cell: Callable[[Cell, Sequence[Measurement]], None]
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    ceilings: dict[str, dict[str, float]] = field(default_factory=dict)  # thread mode → precision → GFLOP/s
    calibration_ms: list[float] = field(default_factory=list)
    _baselines_mib: dict[Contestant, float] = field(default_factory=dict)

    def measure(self, mode: ThreadMode) -> None:
        """Every cell on one thread or on all."""
        for group in GROUPS:
            contestants = [c for c in self.contestants if set(group) & set(c.entries(self.config))]
            entries = {entry for c in contestants[1:] for entry in c.entries(self.config)} & set(group)
            wanted = cells(self.case, self.config, entries, mode)
            contestants = [c for c in contestants if any(self._takes_part(c, cell) for cell in wanted)]
            if wanted:
                with self._opened(contestants, threads=1 if mode == "one" else num_cores()) as workers:
                    self._measure_group(workers, wanted, mode)

    def _takes_part(self, contestant: Contestant, cell: Cell) -> bool:
        return takes_part(contestant, self.config, cell, self.effort.compile_batches)

    def _measure_group(self, workers: list[Worker], wanted: Sequence[Cell], mode: ThreadMode) -> None:
        eager = workers[0]
        rng = np.random.default_rng([self.seed, len(self.rows)])
        self.calibration_ms.append(eager.call("calibration_ms"))
        before = self._ceilings(eager)
        measured = []
        for cell in wanted:
            able = [worker for worker in workers if self._takes_part(worker.contestant, cell)]
            found, broken = measure_cell(able, self.config, self.case, cell, self.effort, rng)
            for worker in [worker for worker in workers if worker.contestant in broken]:
                self._skip(worker, broken[worker.contestant])
                workers.remove(worker)
            measured += [(cell, found[0], item) for item in found]
            self.on_cell(cell, found)
        after = self._ceilings(eager)
        ceilings = {name: significant((before[name] + after[name]) / 2) for name in before}
        self.ceilings.setdefault(mode, ceilings)
        for cell, reference, item in measured:
            contestant = item.contestant
            self.rows.append(
                item.row(
                    cell,
                    threads=1 if mode == "one" else num_cores(),
                    baseline_mib=self._baselines_mib[contestant],
                    ceiling_gflops=ceilings.get(contestant.precision),
                    eager=reference,
                )
            )

    def _ceilings(self, eager: Worker) -> dict[str, float]:
        rows = max(512, self.config.max_history)
        return {p: eager.call("gemm_gflops", self.config, rows, p) for p in CEILING_PRECISIONS}

    @contextlib.contextmanager
    def _opened(self, contestants: Sequence[Contestant], threads: int) -> Iterator[list[Worker]]:
        """Workers of all contestants that can run here, loaded at the same time."""
        with contextlib.ExitStack() as stack:
            workers = []
            for contestant in contestants:
                workers.append(Worker(contestant, threads=threads))
                stack.callback(workers[-1].close)
            ready = []
            for worker in workers:
                try:
                    opened = worker.receive(timeout_s=self.effort.first_answer_s)
                except WorkerError as error:
                    self._skip(worker, error)
                else:
                    self._baselines_mib[worker.contestant] = opened["baseline_mib"]
                    ready.append(worker)
            yield ready

    def _skip(self, worker: Worker, error: WorkerError) -> None:
        if not worker.contestant.optional:
            raise error
        worker.close()
        self.skipped.append(
            {
                "case": self.case.name,
                "runtime": worker.contestant.runtime,
                "precision": worker.contestant.precision,
                "reason": str(error),
            }
        )
