"""What all threads are worth: every runtime on one thread and on all, side by side in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hstu.config import HSTUConfig
from stages.measure.cases import Case, Cell
from stages.measure.interleave import TURN_SECONDS, Effort
from stages.measure.requests import draw_request
from stages.measure.statistics import median_with_interval, significant
from stages.measure.worker import Worker

REQUESTS = 4  # of a turn, when they are short


def measure_scaling(
    pairs: Sequence[tuple[Worker, Worker]],
    config: HSTUConfig,
    case: Case,
    cell: Cell,
    effort: Effort,
    rng: np.random.Generator,
    *,
    threads: int,
) -> list[dict[str, Any]]:
    """A row for each runtime: the time on one thread over that on `threads`, round by round, same requests.

    Each pair is the same runtime opened on one thread and on all.
    """
    rows = []
    once = 0.0
    for worker in (worker for pair in pairs for worker in pair):
        for _ in range(2):  # the first answer compiles and packs
            request = draw_request(config, cell, rng, candidates=case.candidates)
            worker.send("time", cell.entry, [request], wake=False)
            once = float(worker.receive(timeout_s=effort.first_answer_s)[0][0])
    per_turn = REQUESTS if once < TURN_SECONDS else 1
    medians: list[list[tuple[float, float]]] = [[] for _ in pairs]
    seconds: list[list[float]] = [[0.0, 0.0] for _ in pairs]  # of all requests, and waited for a core
    started = time.perf_counter()
    for done in range(effort.max_rounds):
        if done >= effort.min_rounds and time.perf_counter() - started > effort.cell_seconds:
            break
        requests = [draw_request(config, cell, rng, candidates=case.candidates) for _ in range(per_turn)]
        for index, pair in enumerate(pairs):
            turn = []
            for worker in pair:
                took, waited = worker.call("time", cell.entry, requests, wake=per_turn > 1)
                turn.append(float(np.median(took)))
                seconds[index][0] += sum(took)
                seconds[index][1] += waited
            medians[index].append((turn[0], turn[1]))
    for (worker, _), found, (total, waited) in zip(pairs, medians, seconds, strict=True):
        factor, interval = median_with_interval([one / all_ for one, all_ in found])
        rows.append(
            {
                "case": cell.case,
                "entry": cell.entry,
                "runtime": worker.contestant.runtime,
                "backend": worker.contestant.backend,
                "precision": worker.contestant.precision,
                "batch": cell.batch,
                "length": cell.length,
                "threads": threads,
                "one_thread_ms": significant(np.median([one for one, _ in found]) * 1e3),
                "all_threads_ms": significant(np.median([all_ for _, all_ in found]) * 1e3),
                "scaling": factor,
                "scaling_ci95": list(interval),
                "core_wait_share": round(waited / total, 3),
                "rounds": len(found),
            }
        )
    return rows
