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
from stages.measure.contestants import Compiling, Contestant
from stages.measure.requests import Request, draw_request
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
    compiling: Compiling


@dataclass(kw_only=True, slots=True)
class Measurement:
    """What one runtime showed on one cell; not timed when its answers were wrong, but for one peer."""

    contestant: Contestant
    check: Check
    seconds: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)  # of the requests of each round
    waited_s: float = 0.0  # for a core, while other work had it
    peak_mib: float = 0.0

    @property
    def wait_share(self) -> float:
        """Time that threads waited for a core, over the time of all requests; 0 on a machine that does nothing else."""
        return self.waited_s / sum(self.seconds) if self.seconds else 0.0

    def ratios(self, other: Measurement) -> list[float]:
        """How many times as long the other took, round by round: both had the same requests."""
        return [theirs / ours for theirs, ours in zip(other.medians, self.medians, strict=True)]


@dataclass(kw_only=True, slots=True)
class Found:
    """All of one cell: eager PyTorch's measurement first, the peers that broke down, and the matrix products.

    `flops` is the least work of one request, on average; `gflops` has the rate of every precision, round by round.
    """

    cell: Cell
    measurements: list[Measurement]
    broken: dict[Contestant, WorkerError] = field(default_factory=dict)
    flops: float = 0.0
    gflops: dict[str, list[float]] = field(default_factory=dict)
    products: dict[str, str] = field(default_factory=dict)


def measure_cell(
    workers: Sequence[Worker],
    roof: Worker | None,
    config: HSTUConfig,
    case: Case,
    cell: Cell,
    effort: Effort,
    rng: np.random.Generator,
) -> Found:
    """The measurement of every runtime on one cell, and in the same rounds that of the matrix products (`roof`).

    The first worker is eager PyTorch. A peer (torch.compile, vLLM) that breaks down is left out and named; any
    other runtime's failure is raised.
    """
    count = max(2, case.check_users // cell.batch)  # the first request compiles and packs, so the second warms up
    requests = [draw_request(config, cell, rng, candidates=case.candidates) for _ in range(count)]
    checks, broken = _check(workers, cell, requests, effort)
    found = Found(cell=cell, measurements=[Measurement(contestant=c, check=k) for c, k in checks.items()])
    found.broken = broken
    timed = [
        worker
        for worker in workers
        if worker.contestant in checks and (checks[worker.contestant].correct or worker.contestant.timed_though_wrong)
    ]
    if workers[0] in timed:
        _time(timed, roof, found, config, case, effort, rng)
    return found


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
                if len(answers) == 1:
                    worker.call("settle")
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
    roof: Worker | None,
    found: Found,
    config: HSTUConfig,
    case: Case,
    effort: Effort,
    rng: np.random.Generator,
) -> None:
    cell = found.cell

    def draw(count: int) -> list[Request]:
        return [draw_request(config, cell, rng, candidates=case.candidates) for _ in range(count)]

    once = float(workers[0].call("time", cell.entry, draw(1), wake=True)[0][0])
    per_turn = int(np.clip(TURN_SECONDS / once, 1, MAX_PER_TURN))
    by_contestant = {measurement.contestant: measurement for measurement in found.measurements}
    flops: list[float] = []
    started = time.perf_counter()
    for done in range(effort.max_rounds):
        if done >= effort.min_rounds and time.perf_counter() - started > effort.cell_seconds:
            break
        requests = draw(per_turn)
        if cell.entry in ("retrieve", "rank"):
            flops += [
                answer_flops(config, r.histories.lengths.tolist(), entry=cell.entry, candidates=case.candidates)
                for r in requests
            ]
        for worker in workers:
            seconds, waited = worker.call("time", cell.entry, requests, wake=once < TURN_SECONDS)
            measurement = by_contestant[worker.contestant]
            measurement.seconds += seconds
            measurement.medians.append(float(np.median(seconds)))
            measurement.waited_s += waited
        if roof is not None:
            rates, found.products = roof.call("gflops")
            for precision, rate in rates.items():
                found.gflops.setdefault(precision, []).append(rate)
    found.flops = float(np.mean(flops)) if flops else 0.0
    for worker in workers:
        by_contestant[worker.contestant].peak_mib = worker.call("peak_mib")
