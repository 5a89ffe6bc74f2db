"""Replicas on Ray Serve: users find their state, a killed replica and a new bundle cost nobody an answer."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from serving.bundle import Bundle
from stages.load.run import _compare_alone, summary
from stages.load.servers import Server, ours
from stages.load.sessions import Tally, User, steady
from stages.load.wire import Wire
from tests.serving.services import write_bundle

ROOT = Path(__file__).parents[2]
OPTIONS = ("--replicas", "2", "--replica-cpus", "0.25", "--threads", "1", "--no-ranker", "--deadline-ms", "10000")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="no Ray: pip install --no-deps -r locks/cluster.txt"
    ),
]


def replicas(server: Server) -> list[psutil.Process]:
    """The processes of replicas."""
    return [process for process in server.tree() if "ServeReplica" in " ".join(process.cmdline())]


def users_of(server: Server, bundle: Bundle, count: int) -> list[User]:
    return [
        User(
            name=f"user-{number}",
            wire=Wire("127.0.0.1", server.port),
            rng=np.random.default_rng(number),
            items=bundle.vocabulary.items,
            length=4,
            limit=bundle.config.max_history,
            strategy="engine",
        )
        for number in range(count)
    ]


def cluster_address(log: Path) -> str:
    (line,) = [line for line in log.read_text().splitlines() if "Ray runs at" in line]
    return line.rsplit(" ", 1)[1]


def test_a_killed_replica_and_a_new_bundle_cost_nobody_an_answer(bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    newer = write_bundle(tmp_path / "newer", seed=1)
    assert newer.artifact.id != bundle.artifact.id

    async def scenario(server: Server) -> None:
        while "replicas serve bundle" not in log.read_text():  # the first is ready; users move when the second joins
            await asyncio.sleep(0.5)
        users = users_of(server, bundle, 16)
        first = Tally()
        await asyncio.gather(*(user.begin(first) for user in users))
        for _ in range(3):
            await asyncio.gather(*(user.turn(first) for user in users))
        assert set(first.statuses) == {200}
        assert first.hits == 2 * len(users)  # every user came back to where the state is

        # a replica dies
        tally = Tally()
        load = asyncio.create_task(steady(users, seconds=25.0, tally=tally))
        await asyncio.sleep(3.0)
        at = time.monotonic()
        os.kill(replicas(server)[0].pid, signal.SIGKILL)
        await asyncio.sleep(1.0)
        while len(replicas(server)) < 2:
            assert time.monotonic() - at < 60.0
            await asyncio.sleep(0.5)
        await load
        found = summary(tally, 25.0)
        print("killed replica", json.dumps(found))
        assert set(tally.statuses) <= {200, 429, 500, 503}  # those it was answering; nobody hangs, nobody is unknown
        assert tally.broken == 0
        assert found["failed"] <= 8
        assert await _compare_alone(users[0], tally) == 0

        # another bundle takes over
        tally = Tally()
        load = asyncio.create_task(steady(users, seconds=40.0, tally=tally))
        await asyncio.sleep(2.0)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(ROOT / "cli.py"), "serve", "--bundle", str(newer.path), *OPTIONS),
            *("--port", str(server.port), "--cluster", cluster_address(log)),
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.DEVNULL,
        )
        assert await process.wait() == 0
        await load
        found = summary(tally, 40.0)
        print("new bundle", json.dumps(found))
        assert set(tally.statuses) == {200}
        assert tally.broken == 0
        status, answer = await users[0].wire.ask("POST", "/v1/recommend", {"user_id": users[0].name, "k": 5})
        assert status == 200
        assert answer["served"]["bundle"] == newer.artifact.id
        await asyncio.gather(*(user.wire.end() for user in users))

    with ours(bundle.path, log, *OPTIONS) as server:
        asyncio.run(scenario(server))


def test_a_table_is_answered_as_lines_are(bundle: Bundle, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    items = bundle.vocabulary.items
    requests = [
        {
            "user_id": f"u{number}",
            "events": [{"item_id": items[(number + step) % 50], "timestamp": 100 + step} for step in range(3)],
        }
        for number in range(300)
    ]
    pq.write_table(pa.Table.from_pylist(requests), tmp_path / "requests.parquet")
    lines = tmp_path / "requests.jsonl"
    lines.write_text("".join(json.dumps(request) + "\n" for request in requests))

    def recommend(*options: str) -> str:
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), "recommend", "--bundle", str(bundle.path), "--k", "5", *options],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    table = tmp_path / "answers"
    recommend("--ray", "--input", str(tmp_path / "requests.parquet"), "--output", str(table), "--threads", "1")
    answered = {row["user_id"]: row for row in pq.read_table(table).to_pylist()}
    for line in recommend("--input", str(lines)).splitlines():
        expected = json.loads(line)
        found = answered.pop(expected["user_id"])
        assert found["item_ids"] == [str(item["item_id"]) for item in expected["items"]]
        assert np.allclose(found["scores"], [item["score"] for item in expected["items"]], atol=1e-5)
    assert not answered
