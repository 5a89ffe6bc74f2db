"""Two engines of one model side by side: what slows the machine slows both, so only their difference is left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import numpy as np

from hstu.config import HSTUConfig
from stages.measure.cases import Cell
from stages.measure.contestants import Contestant
from stages.measure.requests import Request, draw_request
from stages.measure.worker import Worker

TURN_S = 0.005  # that a turn takes about: long beside a call's cost, short beside how the machine changes
MOST_REQUESTS = 32  # of a turn
OPEN_S = 240.0
SIDES = ("baseline", "candidate")


@dataclass(kw_only=True, slots=True)
class Difference:
    """ln(time of the candidate / time of the baseline): a median over rounds for each time both were opened.

    An engine keeps what it drew when it was opened (where its memory lies), so rounds of one opening agree with one
    another better than with the next: openings are the sample, not rounds. `calibration` is the same of a fixed piece
    of work in the two processes, which took turns with the engines: what is not 0 there is noise of this machine.
    """

    logs: list[float] = field(default_factory=list)
    calibration: list[float] = field(default_factory=list)
    baseline_ms: list[float] = field(default_factory=list)
    candidate_ms: list[float] = field(default_factory=list)
    waited_s: float = 0.0  # for a core, while other work had it; no part of the times
    seconds: float = 0.0  # of all requests, waiting included

    @property
    def wait_share(self) -> float:
        """Time that threads waited for a core, over the time of all requests."""
        return self.waited_s / self.seconds if self.seconds else 0.0

    def __add__(self, other: Difference) -> Difference:
        """All openings of both."""
        return Difference(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})


@contextlib.contextmanager
def both_sides(baseline: Contestant, candidate: Contestant) -> Iterator[dict[str, Worker]]:
    """A process of one thread for each side; `measure_difference` opens engines in them."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for side, contestant in zip(SIDES, (baseline, candidate), strict=True):
            workers[side] = Worker(contestant, threads=1)
            stack.callback(workers[side].close)
        for worker in workers.values():
            worker.receive(timeout_s=OPEN_S)
        yield workers


def measure_difference(
    workers: dict[str, Worker],
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

    Times are without what the processes waited for a core. `slower` makes the candidate work longer by that share
    after every answer, to see whether that is found out.
    """
    found = Difference()
    rng = np.random.default_rng(seed)
    requests = [draw_request(config, cell, rng, candidates=1) for _ in range(MOST_REQUESTS)]
    contestants = dict(zip(SIDES, (baseline, candidate), strict=True))
    for opening in range(openings):
        for side in SIDES:
            workers[side].open(contestants[side])
        for side in SIDES:
            workers[side].receive(timeout_s=OPEN_S)
        once = max(min(workers[side].call("time", cell.entry, requests[:3], wake=True)[0]) for side in SIDES)
        count = int(np.clip(TURN_S / once, 2, MOST_REQUESTS))
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        fixed: dict[str, list[float]] = {side: [] for side in SIDES}
        for done in range(rounds):
            turn: list[Request] = [requests[(done + k) % MOST_REQUESTS] for k in range(count)]
            for side in SIDES if (done + opening) % 2 else SIDES[::-1]:
                extra = slower if side == "candidate" else 0.0
                seconds, waited = workers[side].call("time", cell.entry, turn, wake=True, slower=extra)
                times[side].append(max(sum(seconds) - waited, 1e-9) / count)
                fixed[side].append(workers[side].call("fixed_work_s"))
                found.seconds += sum(seconds)
                found.waited_s += waited
        for logs, values in ((found.logs, times), (found.calibration, fixed)):
            ratio = np.array(values["candidate"]) / np.array(values["baseline"])
            logs.append(float(np.median(np.log(ratio))))
        found.baseline_ms.append(float(np.median(times["baseline"])) * 1e3)
        found.candidate_ms.append(float(np.median(times["candidate"])) * 1e3)
    return found
