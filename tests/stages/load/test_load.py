from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from hstu.errors import UsageError
from serving.bundle import open_bundle
from stages.load import run as load
from stages.load.case_bundle import link_case_bundle
from stages.load.sessions import Tally, User, saturated, steady
from stages.load.wire import Wire
from tests.models import random_model, tiny_config, write_checkpoint


async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that knows one answer, says 429 to every fifth request and breaks the connection at every eleventh."""
    count = 0
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            writer.close()
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        count += 1
        if count % 11 == 0:
            writer.close()
            return
        body = json.dumps({"items": [{"item_id": "5", "score": 0.5}], "served": {"cache": "hit", "fallbacks": []}})
        status = b"429 Too Many Requests" if count % 5 == 0 else b"200 OK"
        writer.write(b"HTTP/1.1 " + status + f"\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


def drive(kind, seconds: float) -> Tally:
    async def scenario() -> Tally:
        server = await asyncio.start_server(answering, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        users = [
            User(name=f"u{n}", wire=Wire("127.0.0.1", port), rng=np.random.default_rng(n), items=["1", "2"],
                 length=3, limit=10, strategy="")
            for n in range(4)
        ]  # fmt: skip
        tally = Tally()
        await asyncio.gather(*(user.begin(tally) for user in users))
        await kind(users, seconds=seconds, tally=tally)
        assert all(later["timestamp"] > earlier["timestamp"] for u in users
                   for earlier, later in zip(u.events, u.events[1:], strict=False))  # fmt: skip
        for user in users:
            user.wire.close()
        server.close()
        await asyncio.sleep(0.2)  # both ends of every connection are told
        return tally

    return asyncio.run(scenario())


def test_every_outcome_is_counted_and_a_broken_connection_is_replaced():
    tally = drive(saturated, 1.0)
    assert tally.broken > 1
    assert tally.statuses[200] > tally.statuses[429] > 0
    assert tally.hits > 0
    found = load.summary(tally, 1.0)
    assert found["failed"] == tally.broken
    assert found["refused_429"] == tally.statuses[429]
    assert found["latency_ms"]["p50"] <= found["latency_ms"]["p95"] <= found["latency_ms"]["max"]


def test_steady_users_ask_about_once_a_second():
    tally = drive(steady, 2.0)
    asked = sum(tally.statuses.values()) + tally.broken
    assert 4 <= asked <= 40


def test_a_part_that_is_there_is_not_run_again(tmp_path, bundle_folder, capsys):
    identity = open_bundle(bundle_folder).artifact.id
    done = {"schema": "load/1", "bundles": {identity: {"parts": {"hot": {"faster": 12.0}}}}}
    (tmp_path / load.FILE).write_text(json.dumps(done))
    found = load.run(bundle_folder, tmp_path, ["hot"], load.LoadSettings())
    assert found["parts"]["hot"] == {"faster": 12.0}
    assert "there already" in capsys.readouterr().err
    with pytest.raises(UsageError, match="kill-ranker"):
        load.run(bundle_folder, tmp_path, ["nope"], load.LoadSettings())


@pytest.fixture
def bundle_folder(tmp_path):
    """A benchmark case's folder made a bundle; its engine is never opened here."""
    case = tmp_path / "case"
    write_checkpoint(case / "checkpoint", random_model(tiny_config(num_layers=1)))
    for name in ("int8", "fp32"):
        folder = case / "build-engine" / name
        folder.mkdir(parents=True)
        spec = {"backend": "onnxruntime", "precision": name, "entries": {}, "executed": True}
        (folder / "engine.json").write_text(json.dumps(spec))
    return link_case_bundle(case, tmp_path / "bundle")


def test_a_case_becomes_a_bundle_that_opens(bundle_folder):
    bundle = open_bundle(bundle_folder)
    assert bundle.engines == ("int8", "fp32")
    assert bundle.artifact.manifest["inputs"]["checkpoint"]
