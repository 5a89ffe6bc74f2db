"""Worker processes that are killed, and messages between processes."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import pytest

from hstu.errors import ArtifactError
from serving.frames import decode, encode
from tests.serving.services import client, events, service_of


def test_messages_come_back_as_they_were():
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.float32([1.5]), "none": np.zeros((0, 4), "f4")}
    arrays["none"] = arrays["none"].astype(np.float32)
    message = encode({"id": 3}, arrays)
    head = int.from_bytes(message[:4], "little")
    header, found = decode(message[12 : 12 + head], message[12 + head :])
    assert header == {"id": 3}
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_a_message_with_objects_in_it_is_refused():
    with pytest.raises(ArtifactError, match="type that is not used"):
        decode(b'{"arrays": [{"name": "x", "dtype": "object", "shape": [1]}]}', b"12345678")


def test_a_killed_ranker_is_answered_for_and_comes_back(bundle):
    asked = {"events": events(bundle, 3, 7, 9), "strategy": "unified", "k": 5}

    async def scenario() -> None:
        async with client(bundle, settings={"ranker": True, "deadline_ms": 5000}) as http:
            service = service_of(http)
            before = (await http.post("/v1/recommend", json=asked)).json()
            assert before["served"]["ranker"] == "ranker"
            os.kill(service.runtimes.workers["ranker"].pid, signal.SIGKILL)
            seen = set()
            for _ in range(400):
                reply = await http.post("/v1/recommend", json=asked)
                assert reply.status_code == 200
                answer = reply.json()
                seen.add(answer["served"]["ranker"])
                if answer["served"]["ranker"] is None:
                    (fallback,) = answer["served"]["fallbacks"]
                    assert fallback["used"] == "unranked"
                elif None in seen:
                    assert answer["items"] == before["items"]
                    break
                await asyncio.sleep(0.05)
            assert seen == {None, "ranker"}
            assert service.runtimes.workers["ranker"].restarts == 1

    asyncio.run(scenario())


def test_what_a_process_receives_may_be_written_to():
    """OpenVINO takes feeds as they lie, and refuses memory that it could not write to."""
    message = encode({"id": 1}, {"a": np.arange(3, dtype=np.int64)})
    head = int.from_bytes(message[:4], "little")
    _, arrays = decode(message[12 : 12 + head], bytearray(message[12 + head :]))
    assert arrays["a"].flags.writeable
