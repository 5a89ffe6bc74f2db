"""One cell, all runtimes: answers are checked, then timed in rounds A B C A B C …, fresh requests each round."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hstu.config import HSTUConfig
from stages.measure.cases import Case, Cell
from stages.measure.ceiling import answer_flops
from stages.measure.check import Check, check_answers
from stages.measure.requests import Request, draw_request
from stages.measure.runtimes import EAGER, Contestant
from stages.measure.statistics import latency_ms, median_with_interval, significant
from stages.measure.worker import Worker, WorkerError

TURN_SECONDS = 0.03  # a runtime answers about this long before the next has its turn
MAX_PER_TURN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How long to measure: at least `min_rounds`, then until `cell_seconds` have passed or `max_rounds` are done."""

    cell_seconds: float
    min_rounds: int
    max_rounds: int
    first_answer_s: float  # how long a runtime may take for its first answer (torch.compile compiles then)
    compile_batches: tuple[int, ...]  # batch sizes at which torch.compile takes part: each new one compiles again


@dataclass(kw_only=True, slots=True)
class Measurement:
    """What one runtime showed on one cell; not timed when its answers were wrong."""

    contestant: Contestant
    check: Check
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # eager's median of a round over this runtime's
    flops: float = 0.0  # of all timed requests together
    waited_s: float = 0.0  # for a core, while other work had it
    peak_mib: float = 0.0

    @property
    def wait_share(self) -> float:
        """Time that threads waited for a core, over the time of all requests; 0 on a machine that does nothing else."""
        return self.waited_s / sum(self.seconds) if self.seconds else 0.0

    def row(
        self, cell: Cell, threads: int, baseline_mib: float, ceiling_gflops: float | None, eager: Measurement
    ) -> dict[str, Any]:
        """The result as benchmark.json holds it; `core_wait_share` is this runtime's or eager's, the larger."""
        row: dict[str, Any] = {
            "case": cell.case,
            "entry": cell.entry,
            "runtime": self.contestant.runtime,
            "backend": self.contestant.backend,
            "precision": self.contestant.precision,
            "batch": cell.batch,
            "length": cell.length,
            "occupancy": cell.occupancy,
            "thread_mode": cell.thread_mode,
            "threads": threads,
            "correct": self.check.correct,
            "max_abs_error": significant(self.check.max_abs_error, 3),
            "top10_overlap": None if self.check.top10_overlap is None else significant(self.check.top10_overlap),
            "latency_ms": None,
            "throughput_rps": None,
            "peak_memory_mib": None,
            "library_memory_mib": None,
            "ratio_to_eager": None,
            "ratio_ci95": None,
            "share_of_ceiling": None,
            "core_wait_share": None,
            "rounds": len(self.ratios),
            "requests": len(self.seconds),
        }
        if self.seconds:
            ratio, interval = median_with_interval(self.ratios)
            row |= {
                "latency_ms": latency_ms(self.seconds),
                "throughput_rps": significant(cell.batch * len(self.seconds) / sum(self.seconds)),
                "peak_memory_mib": round(self.peak_mib, 1),
                "library_memory_mib": round(baseline_mib, 1),
                "ratio_to_eager": ratio,
                "ratio_ci95": list(interval),
                "core_wait_share": round(max(self.wait_share, eager.wait_share), 3),
            }
            if self.flops and ceiling_gflops:
                row["share_of_ceiling"] = significant(self.flops / sum(self.seconds) / 1e9 / ceiling_gflops, 3)
        return row


def measure_cell(
    workers: Sequence[Worker], config: HSTUConfig, case: Case, cell: Cell, effort: Effort, rng: np.random.Generator
) -> tuple[list[Measurement], dict[Contestant, WorkerError]]:
    """The measurement of every runtime on one cell, eager PyTorch's first, and the peers that broke down on it.

    The first worker is eager PyTorch. A peer (torch.compile, vLLM) that breaks down is left out and named; any
    other runtime's failure is raised.
    """
    requests = [
        draw_request(config, cell, rng, candidates=case.candidates)
        for _ in range(max(1, case.check_users // cell.batch))
    ]
    checks, broken = _check(workers, cell, requests, effort)
    timed = [worker for worker in workers if worker.contestant in checks and checks[worker.contestant].correct]
    found = {c: Measurement(contestant=c, check=check) for c, check in checks.items()}
    if workers[0] in timed:
        _time(timed, found, config, case, cell, effort, rng)
    return list(found.values()), broken


def _check(
    workers: Sequence[Worker], cell: Cell, requests: Sequence[Request], effort: Effort
) -> tuple[dict[Contestant, Check], dict[Contestant, WorkerError]]:
    eager = workers[0]
    expected: list[Mapping[str, Any]] = []
    checks: dict[Contestant, Check] = {}
    broken: dict[Contestant, WorkerError] = {}
    for worker in workers:
        answers: list[Mapping[str, Any]] = []
        try:
            for request in requests:
                worker.send("answer", cell.entry, request)
                answers.append(worker.receive(timeout_s=effort.first_answer_s))
        except WorkerError as error:
            if not worker.contestant.optional:
                raise
            broken[worker.contestant] = error
            continue
        expected = expected or answers
        slate_errors = []
        if cell.entry == "generate":
            slate_errors = [
                eager.call("slate_error", request, answer["slates"])
                for request, answer in zip(requests, answers, strict=True)
            ]
        checks[worker.contestant] = check_answers(
            cell, worker.contestant.precision, expected, answers, slate_errors=slate_errors
        )
    return checks, broken


def _time(
    workers: Sequence[Worker],
    found: Mapping[Contestant, Measurement],
    config: HSTUConfig,
    case: Case,
    cell: Cell,
    effort: Effort,
    rng: np.random.Generator,
) -> None:
    def draw(count: int) -> list[Request]:
        return [draw_request(config, cell, rng, candidates=case.candidates) for _ in range(count)]

    once = float(workers[0].call("time", cell.entry, draw(1), wake=True)[0][0])
    per_turn = int(np.clip(TURN_SECONDS / once, 1, MAX_PER_TURN))
    for worker in workers:
        worker.call("reset_peak")
    started = time.perf_counter()
    for done in range(effort.max_rounds):
        if done >= effort.min_rounds and time.perf_counter() - started > effort.cell_seconds:
            break
        requests = draw(per_turn)
        flops = 0.0
        if cell.entry in ("retrieve", "rank"):
            flops = sum(
                answer_flops(config, r.histories.lengths.tolist(), entry=cell.entry, candidates=case.candidates)
                for r in requests
            )
        eager_median = 0.0
        for worker in workers:
            seconds, waited = worker.call("time", cell.entry, requests, wake=once < TURN_SECONDS)
            median = float(np.median(seconds))
            if worker.contestant.runtime == EAGER:
                eager_median = median
            measurement = found[worker.contestant]
            measurement.seconds += seconds
            measurement.ratios.append(eager_median / median)
            measurement.flops += flops
            measurement.waited_s += waited
    for worker in workers:
        found[worker.contestant].peak_mib = worker.call("peak_mib")
