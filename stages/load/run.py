"""Load from another process than the server's: steady sessions, saturation, kills, a naive server beside; `load.json`.

Every part of a run is written as it ends, and a part that is there for the same bundle is not run again (`--again`
runs all): a long run may be cut and taken up.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hstu.data.vocabulary import Vocabulary
from hstu.errors import UsageError
from serving.bundle import Bundle, open_bundle
from stages.contract import say
from stages.load.servers import Server, naive, ours
from stages.load.sessions import Tally, User, saturated, steady
from stages.load.wire import Wire

FILE = "load.json"
PARTS = ("steady", "saturated", "naive", "hot", "kill-ranker", "kill-slates")
_BACK_WITHIN_S = 60.0
_TRIES = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSettings:
    """How hard and how long."""

    sessions: int = 128
    seconds: float = 180.0  # of the steady part; the saturated ones take a sixth, at most half a minute
    history: int = 20  # events of a user to begin with
    strategy: str = ""  # of the requests; empty: the service's policy
    serve: tuple[str, ...] = ()  # further options of `cli.py serve`
    again: bool = False
    seed: int = 0


def run(bundle_path: Path, reports: Path, parts: list[str], settings: LoadSettings) -> dict[str, Any]:
    """`load.json` with the parts that were asked for (none: all); UsageError for one that is not known."""
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise UsageError("there is no such part of the load test", got=unknown[0], expected=", ".join(PARTS))
    bundle = open_bundle(bundle_path)
    path = reports / FILE
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"schema": "load/1", "bundles": {}}
    found = report["bundles"].setdefault(bundle.artifact.id, {"model": bundle.config.to_dict(), "parts": {}})
    found["cores"] = os.cpu_count()
    for part in parts or [p for p in PARTS if p != "kill-slates"]:
        if part in found["parts"] and not settings.again:
            say(f"load: {part} is there already")
            continue
        say(f"load: {part}")
        began = time.monotonic()
        found["parts"][part] = _run_part(part, bundle, reports, settings) | {
            "ran_s": round(time.monotonic() - began, 1)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    return found  # type: ignore[no-any-return]


def _run_part(part: str, bundle: Bundle, reports: Path, settings: LoadSettings) -> dict[str, Any]:
    log = reports / "load.log"
    log.unlink(missing_ok=True)
    short = min(30.0, settings.seconds / 6.0)
    if part == "naive":
        with naive(bundle.path, log) as server:
            return asyncio.run(_measure(server, bundle, settings, saturated, short))
    options = (*settings.serve, *(("--vllm",) if part == "kill-slates" else ()))
    with ours(bundle.path, log, *options) as server:
        if part == "hot":
            return asyncio.run(_hot_and_cold(server, bundle, settings))
        if part.startswith("kill-"):
            role = part.removeprefix("kill-")
            return asyncio.run(_killed(server, bundle, settings, role, short))
        kind, seconds = (steady, settings.seconds) if part == "steady" else (saturated, short)
        return asyncio.run(_measure(server, bundle, settings, kind, seconds))


def _users(
    server: Server, bundle: Bundle, settings: LoadSettings, count: int, strategy: str, *, name: str = "user"
) -> list[User]:
    vocabulary: Vocabulary = bundle.vocabulary
    items: Sequence[str | int] = vocabulary.items or tuple(range(1, vocabulary.raw_items + 1))
    rng = np.random.default_rng(settings.seed)
    return [
        User(
            name=f"{name}-{number}",
            wire=Wire("127.0.0.1", server.port),
            rng=np.random.default_rng([settings.seed, number]),
            items=items,
            length=max(1, int(rng.normal(settings.history, settings.history / 4))),
            limit=bundle.config.max_history,
            strategy=strategy,
            body={"deadline_ms": 60_000},
        )
        for number in range(count)
    ]


async def _measure(
    server: Server,
    bundle: Bundle,
    settings: LoadSettings,
    kind: Callable[..., Awaitable[None]],
    seconds: float,
) -> dict[str, Any]:
    users = _users(server, bundle, settings, settings.sessions, settings.strategy)
    if kind is steady:
        for user in users:
            user.body.clear()  # the service's own deadline counts
    first = Tally()
    for start in range(0, len(users), 8):
        await asyncio.gather(*(user.begin(first) for user in users[start : start + 8]))
    warm = Tally()
    await kind(users, seconds=min(5.0, seconds / 4.0), tally=warm)
    before = server.resident_mib()
    tally = Tally()
    began = time.monotonic()
    await kind(users, seconds=seconds, tally=tally)
    took = time.monotonic() - began
    after = server.resident_mib()
    wrong = await _compare_alone(users[0], tally)
    await asyncio.gather(*(user.wire.end() for user in users))
    return summary(tally, took) | {
        "sessions": len(users),
        "resident_mib": round(after, 1),
        "resident_growth": round(after / before - 1.0, 4),
        "compared_alone": min(40, len(tally.kept)),
        "unlike_alone": wrong,
    }


async def _compare_alone(user: User, tally: Tally) -> int:
    """How many of the kept answers differ from the answer to the same events with nothing else to do.

    An answer that fell back is held against those who gave it: unranked against the engine.
    """
    wrong = 0
    for events, answer in tally.kept[:40]:
        served = answer.get("served", {})
        asked = {"events": events, "k": 10, "deadline_ms": 60_000, "strategy": _who(served)}
        for _ in range(_TRIES):
            status, alone = await user.wire.ask("POST", "/v1/recommend", asked)
            if status == 200 and _who(alone.get("served", {})) == _who(served):
                break
            await asyncio.sleep(0.5)  # what just came back may still be down for this one
        scores = [[item["score"] for item in one["items"]] for one in (answer, alone)] if status == 200 else [[0.0], []]
        wrong += len(scores[0]) != len(scores[1]) or not np.allclose(scores[0], scores[1], atol=_tolerance(served))
    return wrong


def _who(served: dict[str, Any]) -> str:
    """The strategy of which this answer is one that nobody stood in for."""
    if served.get("ranker") is not None:
        return "unified"
    runtime = served.get("runtime")
    return runtime if runtime in ("vllm", "torch") else "engine"


def _tolerance(served: dict[str, Any]) -> float:
    """Of two ways through one engine: a state extended or a history computed whole, alone or in a batch."""
    return {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2, "int8": 5e-2}[served.get("precision", "fp32")]


def summary(tally: Tally, seconds: float) -> dict[str, Any]:
    """Counts, rates and percentiles."""
    found = np.array(tally.seconds) * 1e3 if tally.seconds else np.array([np.nan])
    good = tally.statuses.get(200, 0)
    failed = sum(count for status, count in tally.statuses.items() if status not in (200, 429))
    p50, p95, p99 = np.percentile(found, [50, 95, 99]).tolist()
    return {
        "seconds": round(seconds, 1),
        "answered": good,
        "answered_per_s": round(good / seconds, 2),
        "refused_429": tally.statuses.get(429, 0),
        "failed": failed + tally.broken,
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "latency_ms": {
            "p50": round(p50, 2),
            "p95": round(p95, 2),
            "p99": round(p99, 2),
            "max": round(float(found.max()), 2),
        },
        "state_hits": tally.hits,
        "with_fallback": tally.fallbacks,
    }


async def _hot_and_cold(server: Server, bundle: Bundle, settings: LoadSettings) -> dict[str, Any]:
    """One user at a time: what a first visit takes, and a return with one new event."""
    cold: list[float] = []
    hot: list[float] = []
    history = bundle.config.max_history - 12
    for user in _users(server, bundle, settings, 8, "engine"):
        user.length = history
        await user.begin(Tally())
        for visit in range(9):
            tally = Tally()
            began = time.perf_counter()
            asked = {"user_id": user.name, "k": 10, "strategy": "engine", "deadline_ms": 60_000}
            status, answer = await user.wire.ask("POST", "/v1/recommend", asked)
            took = (time.perf_counter() - began) * 1e3
            if status != 200 or answer["served"]["cache"] != ("hit" if visit else "miss"):
                continue
            (hot if visit else cold).append(took)
            await user._happen([user._event()], tally)
        await user.wire.end()
    cold_ms, hot_ms = float(np.median(cold)), float(np.median(hot))
    return {
        "history": history,
        "cold_ms": round(cold_ms, 2),
        "hot_ms": round(hot_ms, 2),
        "faster": round(cold_ms / hot_ms, 2),
        "users": len(cold),
    }


async def _killed(server: Server, bundle: Bundle, settings: LoadSettings, role: str, seconds: float) -> dict[str, Any]:
    """kill -9 of a worker under load: what the users saw, and when its answers came back."""
    strategy = "unified" if role == "ranker" else "vllm"
    users = _users(server, bundle, settings, min(settings.sessions, 32), strategy, name=role)
    tally = Tally()
    for user in users:
        user.body.clear()
        await user.begin(tally)
    probe = Wire("127.0.0.1", server.port)
    load = asyncio.create_task(steady(users, seconds=seconds + _BACK_WITHIN_S, tally=tally))
    await asyncio.sleep(min(5.0, seconds / 3.0))
    killed = server.kill_worker(role)
    at = time.monotonic()
    back: float | None = None
    await asyncio.sleep(0.5)
    while back is None and time.monotonic() - at < 2.0 * _BACK_WITHIN_S:
        asked = {"user_id": users[0].name, "k": 5, "strategy": strategy, "deadline_ms": 10_000}
        status, answer = await probe.ask("POST", "/v1/recommend", asked)
        if status == 200 and not answer["served"]["fallbacks"]:
            back = time.monotonic() - at
        await asyncio.sleep(0.25)
    await asyncio.sleep(2.0)
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    took = time.monotonic() - at
    wrong = await _compare_alone(users[0], tally)
    await asyncio.gather(probe.end(), *(user.wire.end() for user in users))
    return summary(tally, took) | {
        "killed": killed,
        "compared_alone": min(40, len(tally.kept)),
        "whole_again_s": None if back is None else round(back, 2),
        "unlike_alone": wrong,
    }
