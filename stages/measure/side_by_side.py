"""Two engines of one model side by side: what slows the machine slows both, so only their difference is left."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np

from hstu.config import HSTUConfig
from stages.measure.cases import Cell
from stages.measure.contestants import Contestant
from stages.measure.requests import draw_request
from stages.measure.worker import Worker

REQUESTS = 4  # of a turn
WARM_UP = 3  # requests after opening
OPEN_S = 240.0


@dataclass(kw_only=True, slots=True)
class Difference:
    """ln(time of the candidate / time of the baseline): a median over rounds for each time both were opened.

    A process keeps what it drew when it was opened (where its memory lies, which threads it has), so rounds of one
    opening agree with one another better than with the next: openings are the sample, not rounds.
    """

    logs: list[float] = field(default_factory=list)
    baseline_ms: list[float] = field(default_factory=list)
    candidate_ms: list[float] = field(default_factory=list)
    waited_s: float = 0.0  # for a core, while other work had it
    seconds: float = 0.0

    @property
    def wait_share(self) -> float:
        """Time that threads waited for a core, over the time of all requests."""
        return self.waited_s / self.seconds if self.seconds else 0.0


def measure_difference(
    baseline: Contestant,
    candidate: Contestant,
    config: HSTUConfig,
    cell: Cell,
    *,
    openings: int,
    rounds: int,
    seed: int,
    slower: float = 0.0,
) -> Difference:
    """Both opened `openings` times and timed in `rounds` each, on the same requests, now the one first, now the other.

    `slower` makes the candidate work longer by that share after every answer, to see whether that is found out.
    """
    found = Difference()
    rng = np.random.default_rng(seed)
    for opening in range(openings):
        with contextlib.ExitStack() as stack:
            workers = {}
            for side in ("baseline", "candidate") if opening % 2 else ("candidate", "baseline"):
                worker = Worker(baseline if side == "baseline" else candidate, threads=1)
                stack.callback(worker.close)
                worker.receive(timeout_s=OPEN_S)
                workers[side] = worker
            medians: dict[str, list[float]] = {"baseline": [], "candidate": []}
            for done in range(-1, rounds):
                count = WARM_UP if done < 0 else REQUESTS
                requests = [draw_request(config, cell, rng, candidates=1) for _ in range(count)]
                for side in ("baseline", "candidate") if done % 2 else ("candidate", "baseline"):
                    extra = slower if side == "candidate" else 0.0
                    seconds, waited = workers[side].call("time", cell.entry, requests, wake=True, slower=extra)
                    if done >= 0:
                        medians[side].append(float(np.median(seconds)))
                        found.seconds += sum(seconds)
                        found.waited_s += waited
        logs = np.log(np.array(medians["candidate"]) / np.array(medians["baseline"]))
        found.logs.append(float(np.median(logs)))
        found.baseline_ms.append(float(np.median(medians["baseline"])) * 1e3)
        found.candidate_ms.append(float(np.median(medians["candidate"])) * 1e3)
    return found
