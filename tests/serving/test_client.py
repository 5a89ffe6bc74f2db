"""The client against the service, and the example that calls every route."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path

import httpx
import pytest

from serving.client import Client, ServiceError
from serving.schemas import Event
from tests.serving.services import client, events

EXAMPLE = Path(__file__).parents[2] / "examples" / "behaviour.py"


def test_the_client_asks_again_when_told_to_and_gives_up_when_not():
    replies = [httpx.Response(429, headers={"retry-after": "0"}, json={"error": "full"})] * 2
    replies.append(httpx.Response(200, json={"user_id": "u", "num_events": 1}))
    replies.append(httpx.Response(404, json={"error": "nobody"}))

    async def scenario() -> None:
        async with Client("http://x", transport=httpx.MockTransport(lambda request: replies.pop(0))) as http:
            assert (await http.add_events("u", [Event(item_id="1", timestamp=1)])).num_events == 1
            with pytest.raises(ServiceError, match="nobody"):
                await http.recommend(user_id="u")

    asyncio.run(scenario())
    assert not replies


def test_the_example_calls_every_route(bundle, tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("behaviour", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    requests = tmp_path / "requests.jsonl"
    lines = [{"user_id": n, "events": events(bundle, 3 + n, 9, 20, 31, 40)} for n in range(2)]
    for line in lines:
        line["events"] = [event | {"action": "action-1"} for event in line["events"]]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))

    async def scenario() -> None:
        async with client(bundle) as http:
            monkeypatch.setattr(example, "Client", lambda url, key: Client(url, key=key, transport=http._transport))
            await example.main("http://service", requests)

    asyncio.run(scenario())
    told = capsys.readouterr().out
    assert "batch statuses: [200, 200, 404]" in told
    assert "after that: 404" in told
    assert "state hit" in told
