"""The doors of a bundle's server without a server: what they refuse, and that what they pass does not trip vLLM."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import MutableMapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from serving.vllm_plugin.doors import DOORS, MAX_BODY_BYTES, Doors, RefusedError, check_body, guard_server, read_body
from serving.vllm_plugin.records import RECORD_WIDTH
from tests.models import TINY
from tests.serving import hostile

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]


def _packed(value: Any) -> str:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _ask(path: str, raw: bytes, *, method: str = "POST", chunks: int = 1) -> tuple[int, bytes]:
    """Status and body of a request through the doors; behind them stands an application that echoes."""
    size = -(-len(raw) // chunks) or 1
    parts = [raw[begin : begin + size] for begin in range(0, len(raw), size)] or [b""]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def echo(_scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": (await receive())["body"]})

    asyncio.run(Doors(echo)({"type": "http", "method": method, "path": path}, receive, send))
    return sent[0]["status"], sent[1]["body"]


GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "hstu", "prompt": [3, 7], "max_tokens": 5, "temperature": 0, "stop": None}),
    ("/v1/completions", {"prompt": "3 7", "n": 2, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": [[3], [7]], "echo": False, "presence_penalty": 0.0, "logit_bias": {"3": 1.5}}),
    ("/v1/completions", {"prompt": "", "prompt_embeds": _packed(torch.zeros(2, RECORD_WIDTH))}),
    ("/v1/completions", {"prompt": [3], "vllm_xargs": {"deny_items": [4, 5], "exclude_history": True}}),
    ("/v1/embeddings", {"input": [3, 7], "encoding_format": "base64"}),
    ("/pooling", {"input": [3, 7], "task": "embed"}),
    ("/pooling", {"data": {"items": [3], "timestamps": [1]}}),
    ("/pooling", {"data": None}),  # which is the IO processor's to refuse
]


@pytest.mark.parametrize(("door", "body"), GOOD)
def test_what_is_meant_comes_through_unchanged(door: str, body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    for chunks in (1, 3):
        assert _ask(door, raw, chunks=chunks) == (200, raw)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": [3], "structured_outputs": 3}, "structured_outputs"),
    ("/v1/completions", {"prompt": [3], "structured_outputs": {"regex": "."}}, "structured_outputs"),
    ("/v1/completions", {"prompt": [], "prompt_embeds": "AAAA"}, "prompt"),
    ("/v1/completions", {"prompt": [3], "prompt_embeds": _packed(torch.zeros(2, RECORD_WIDTH))}, "prompt"),
    ("/v1/completions", {}, "prompt"),
    ("/v1/completions", {"prompt": [True]}, "prompt"),
    ("/v1/completions", {"prompt": [[1]] * 257}, "prompt"),
    ("/v1/completions", {"prompt": [3], "max_tokens": 0}, "max_tokens"),
    ("/v1/completions", {"prompt": [3], "temperature": True}, "temperature"),
    ("/v1/completions", {"prompt": [3], "min_tokens": False}, "min_tokens"),
    ("/v1/completions", {"prompt": [3], "vllm_xargs": {"kv_transfer_params": 3}}, "vllm_xargs"),
    ("/v1/completions", {"prompt": [3], "repetition_penalty": 1.5}, "repetition_penalty"),
    ("/v1/completions", {"prompt": [3], "exclude_history": True}, "exclude_history"),
    ("/v1/completions", {"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ("/v1/completions", {"prompt_embeds": "é"}, "prompt_embeds"),
    ("/v1/completions", {"prompt_embeds": _packed({"a": 1})}, "prompt_embeds"),
    ("/v1/completions", {"prompt_embeds": _packed(torch.eye(3).to_sparse())}, "prompt_embeds"),
    ("/v1/completions", {"prompt_embeds": _packed(torch.zeros(1, 24).expand(10**9, 24))}, "prompt_embeds"),
    ("/v1/completions", {"prompt_embeds": [_packed(torch.zeros(2, 24).int())]}, "prompt_embeds"),
    ("/v1/embeddings", {"input": [3], "messages": []}, "messages"),
    ("/v1/embeddings", {"input": [3], "dimensions": 8}, "dimensions"),
    ("/pooling", {"input": [3], "data": {}}, "data"),
    ("/pooling", {"input": [3], "task": "classify"}, "task"),
]


@pytest.mark.parametrize(("door", "body", "field"), BAD)
def test_what_cannot_be_meant_is_refused_by_name(door: str, body: dict[str, Any], field: str) -> None:
    status, answer = _ask(door, json.dumps(body).encode())
    error = json.loads(answer)["error"]
    assert (status, error["code"], error["param"]) == (400, 400, field)
    assert field in error["message"]


def test_bodies_that_are_no_request_and_routes_that_are_none() -> None:
    for body in hostile.BODIES:
        for door in DOORS:
            assert _ask(door, body)[0] in (200, 400)
    for route in hostile.ROUTES:
        status, answer = _ask(route, b"{}")
        assert (status, json.loads(answer)["error"]["type"]) == (404, "NotFoundError")
    assert _ask("/pooling", b" " * (MAX_BODY_BYTES + 1))[0] == 413
    assert _ask("/metrics", b"", method="GET") == (200, b"")


def test_a_packed_bomb_is_refused() -> None:
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    with pytest.raises(RefusedError, match="unpacks to more"):
        check_body("/v1/completions", {"prompt_embeds": base64.b64encode(buffer.getvalue()).decode()})


def test_what_comes_through_does_not_trip_vllms_parser() -> None:
    """Ten thousand requests: each is refused here, or vLLM reads it or refuses it in its own words."""
    from pydantic import ValidationError
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError

    rng, passed = np.random.default_rng(7), 0
    for _ in range(10_000):
        body = hostile.completion(rng, TINY)
        try:
            check_body("/v1/completions", read_body(json.dumps(body).encode()))
            CompletionRequest.model_validate(body).to_sampling_params(5)
            passed += 1
        except (RefusedError, ValidationError, VLLMValidationError, ValueError):
            continue
    assert 1500 < passed < 8000


def test_the_doors_stand_behind_the_keys_and_are_hung_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    def middleware(_args: Any, app: Any, _tasks: Any) -> None:
        app.add_middleware("keys")

    server, added = SimpleNamespace(init_entrypoints_middleware=middleware), []
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.launchers.app", server)  # type: ignore[arg-type]
    guard_server()
    guard_server()
    server.init_entrypoints_middleware(None, SimpleNamespace(add_middleware=added.append), ())
    assert added == [Doors, "keys"]  # the last added is the first that is asked
