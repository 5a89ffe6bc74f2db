"""Our cache beside the policies of libCacheSim on the same traces: misses and byte-hit ratios, and the limit.

libCacheSim (Yang et al.) is a development tool, not part of the environment (`locks/tools.txt`). The first fifth of a
trace warms every cache up and is not counted. Belady's rule is optimal for equal sizes only; with sizes
it is the best known reference, and the better of its two forms there (plain, size-aware) is given.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hstu.errors import MissingBackendError, UsageError
from serving.cache import Codec, HotCache
from stages.caching.traces import TRACES, Ints, Trace
from stages.contract import say

FILE = "cache.json"
POLICIES = {"lru": "LRU", "lfu": "LFU", "w-tinylfu": "WTinyLFU", "s3-fifo": "S3FIFO", "lhd": "LHD"}
OURS, LIMIT = "hot cache", "belady"
BUDGETS = (0.05, 0.2)  # of the bytes of all states
SEEDS = (2027,)  # drawn once the predictor was finished: it was made while looking at other draws
COSTS = {  # seconds of computing a state again: for the call, and by its bytes, which are its events
    OURS: (4e-3, 1e-7),  # the call costs what twenty events cost
    f"{OURS}, cost by events": (0.0, 1e-7),  # a deep model
    f"{OURS}, one cost": (4e-3, 0.0),  # a tiny one
}
_WARM_UP = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How one policy did on one trace at one budget."""

    trace: str
    seed: int
    budget: float
    policy: str
    miss_ratio: float  # of requests
    byte_hit_ratio: float


def compare(names: Sequence[str], *, on_score: Callable[[Score], None]) -> list[Score]:
    """Every policy on every trace at every budget, ours among them; the same traces every time.

    MissingBackendError without libCacheSim, UsageError for a trace that is not known.
    """
    if importlib.util.find_spec("libcachesim") is None:
        raise MissingBackendError(
            "libCacheSim is not installed, and it is what the other policies run in",
            expected="the package libcachesim, of locks/tools.txt",
            fix="pip install --no-deps -r locks/tools.txt",
        )
    unknown = sorted(set(names) - set(TRACES))
    if unknown:
        raise UsageError("there is no such trace", got=unknown[0], expected=", ".join(TRACES))
    scores = []
    for name, seed, budget in itertools.product(names, SEEDS, BUDGETS):
        trace = TRACES[name](seed)
        capacity = int(trace.footprint * budget)
        score = partial(_score, name, seed, budget, trace=trace)
        found = [score(policy, hits=_simulate(theirs, trace, capacity)) for policy, theirs in POLICIES.items()]
        once = (seed, budget) == (SEEDS[0], BUDGETS[0])  # the other costs: to see what depends on them
        costs = COSTS if once else {OURS: COSTS[OURS]}
        found += [score(policy, hits=our_hits(trace, capacity, cost)) for policy, cost in costs.items()]
        forms = [score(LIMIT, hits=_simulate(form, trace, capacity)) for form in ("Belady", "BeladySize")]
        found.append(
            replace(
                forms[0],
                miss_ratio=min(form.miss_ratio for form in forms),
                byte_hit_ratio=max(form.byte_hit_ratio for form in forms),
            )
        )
        for one in found:
            on_score(one)
        scores += found
    return scores


def our_hits(trace: Trace, capacity: int, cost: tuple[float, float] = COSTS[OURS]) -> Ints:
    """Which requests our cache answers, int64 0 or 1, in one tier; `cost`: seconds for a call, and for a byte."""
    codec: Codec[int] = Codec(nbytes=int, packed_nbytes=int, pack=lambda size: size.to_bytes(8, "little"),
                              unpack=lambda data: int.from_bytes(data, "little"))  # fmt: skip
    cache = HotCache({"user": codec}, memory_bytes=capacity, device_bytes=capacity)
    hits = np.zeros(len(trace.users), np.int64)
    for row, (time_s, user, nbytes) in enumerate(
        zip(trace.time_s.tolist(), trace.users.tolist(), trace.nbytes.tolist(), strict=True)
    ):
        hits[row] = cache.get("user", str(user), time_s) is not None
        if not hits[row]:
            cache.put("user", str(user), nbytes, cost_s=cost[0] + nbytes * cost[1], now=time_s)
    return hits


def _simulate(policy: str, trace: Trace, capacity: int) -> Ints:
    """Which requests a policy of libCacheSim answers, int64 0 or 1."""
    import libcachesim

    cache = getattr(libcachesim, policy)(cache_size=capacity)
    hits = np.zeros(len(trace.users), np.int64)
    following = _next_requests(trace.users)
    for row, (user, nbytes) in enumerate(zip(trace.users.tolist(), trace.nbytes.tolist(), strict=True)):
        request = libcachesim.Request()
        request.obj_id, request.obj_size = user, nbytes
        request.clock_time, request.next_access_vtime = int(trace.time_s[row]), int(following[row])
        hits[row] = cache.get(request)
    return hits


def _next_requests(users: Ints) -> Ints:
    """For every request the row at which its user asks again, 2^62 for never."""
    following = np.full(len(users), 2**62, np.int64)
    order = np.argsort(users, kind="stable")
    same = users[order][1:] == users[order][:-1]
    following[order[:-1][same]] = order[1:][same]
    return following


def _score(name: str, seed: int, budget: float, policy: str, *, trace: Trace, hits: Ints) -> Score:
    counted = slice(int(len(hits) * _WARM_UP), None)
    sizes = trace.nbytes[counted]
    return Score(
        trace=name,
        seed=seed,
        budget=budget,
        policy=policy,
        miss_ratio=round(1.0 - float(hits[counted].mean()), 4),
        byte_hit_ratio=round(float((hits[counted] * sizes).sum() / sizes.sum()), 4),
    )


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """`cache.json` holds the scores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"schema": "cache-policies/2", "warm_up": _WARM_UP, "scores": [asdict(score) for score in scores]}
    path.write_text(json.dumps(values, indent=1) + "\n")


def means(scores: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float, str], dict[str, float]]:
    """miss_ratio and byte_hit_ratio of every trace, budget and policy, means over the seeds."""
    cells: dict[tuple[str, float, str], dict[str, float]] = {}
    for key in dict.fromkeys((score["trace"], score["budget"], score["policy"]) for score in scores):
        of_seeds = [score for score in scores if (score["trace"], score["budget"], score["policy"]) == key]
        cells[key] = {
            name: float(np.mean([score[name] for score in of_seeds])) for name in ("miss_ratio", "byte_hit_ratio")
        }
    return cells


def table(scores: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one a trace and budget, means over the seeds: byte-hit ratio, misses per 100 requests, ours
    against LRU and Belady."""
    policies = list(dict.fromkeys(score["policy"] for score in scores))
    cells = means(scores)
    rows = []
    for trace, budget in dict.fromkeys((score["trace"], score["budget"]) for score in scores):
        found = {policy: cells.get((trace, budget, policy)) for policy in policies}
        ours, lru, limit = (cells[trace, budget, policy] for policy in (OURS, "lru", LIMIT))
        rows.append(
            [
                trace,
                f"{budget:.0%}",
                *(f"{one['byte_hit_ratio']:.3f} ({one['miss_ratio']:.1%})" if one else "" for one in found.values()),
                f"{ours['miss_ratio'] / lru['miss_ratio'] - 1:+.0%}",
                f"{limit['byte_hit_ratio'] - ours['byte_hit_ratio']:.3f}",
            ]
        )
    return ["trace", "budget", *policies, "misses against LRU", "byte hits below Belady"], rows


def text_table(scores: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    header, rows = table(scores)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def read_scores(reports: Path) -> list[dict[str, Any]]:
    """What `write_scores` wrote; nothing when no comparison was made yet."""
    path = reports / FILE
    return list(json.loads(path.read_text())["scores"]) if path.is_file() else []


def run(reports: Path, names: Sequence[str]) -> list[Score]:
    """Compare on the named traces (none: all) and write `cache.json`."""
    scores = compare(names or tuple(TRACES), on_score=_tell)
    write_scores(reports / FILE, scores)
    return scores


def _tell(score: Score) -> None:
    say(
        f"compare-caches: {score.trace} ({score.seed}) {score.budget:.0%} {score.policy}: "
        f"byte hits {score.byte_hit_ratio:.4f}, misses {score.miss_ratio:.4f}"
    )
