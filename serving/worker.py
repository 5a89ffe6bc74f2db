"""A process that does one kind of work for the service: `python -m serving.worker ROLE BUNDLE FD DETAILS`.

ranker: `rank` of one of the bundle's engines, of all requests that wait in one batch. slates: greedy slates by vLLM,
batched continuously: a request joins those that are running at the next step, and is answered when its own is done.

It ends when the service does (the socket closes). Messages are those of `serving.frames`.
"""

from __future__ import annotations

import json
import select
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from hstu.data.histories import histories_from_rows
from hstu.errors import CompilerError, InputError
from serving.bundle import Bundle, open_bundle
from serving.engine import Array, Engine, check_feeds, open_engine
from serving.engine_order import open_default
from serving.frames import encode, receive_blocking

Arrays = Mapping[str, Array]
Message = tuple[dict[str, Any], dict[str, Array]]
_MAX_BATCH = 32


def main(arguments: list[str]) -> None:
    """Serve one connection until it closes."""
    role, folder, descriptor, details = arguments
    connection = socket.socket(fileno=int(descriptor))
    bundle = open_bundle(Path(folder), verify=False)  # the service has verified it
    serve = {"ranker": _serve_ranker, "slates": _serve_slates}[role]
    serve(connection, bundle, json.loads(details))


def _serve_ranker(connection: socket.socket, bundle: Bundle, details: Mapping[str, Any]) -> None:
    engine = details["engine"]
    opened, fallback = open_default(bundle) if engine is None else (open_engine(bundle.engine_folder(engine)), None)
    stands_in = None if fallback is None else fallback.to_dict()
    connection.sendall(encode({"ready": True, "precision": opened.precision, "fallback": stands_in}, {}))

    while (message := receive_blocking(connection)) is not None:
        messages = [message]
        while len(messages) < _MAX_BATCH and select.select([connection], [], [], 0.0)[0]:  # who came meanwhile
            other = receive_blocking(connection)
            if other is None:
                return
            messages.append(other)
        connection.sendall(b"".join(_ranked(opened, messages)))


def _ranked(engine: Engine, messages: Sequence[Message]) -> list[bytes]:
    """The answers to requests for ranking; where one is wrong in itself, each is computed alone."""
    try:
        return [
            encode({"id": header["id"]}, {"task_scores": scores})
            for (header, _), scores in zip(messages, rank(engine, [arrays for _, arrays in messages]), strict=True)
        ]
    except CompilerError as error:
        if len(messages) > 1:
            return [answer for message in messages for answer in _ranked(engine, [message])]
        kind = "input" if isinstance(error, InputError) else "other"
        return [encode({"id": messages[0][0]["id"], "error": str(error), "kind": kind}, {})]


def rank(engine: Engine, requests: Sequence[Arrays]) -> list[Array]:
    """Task probabilities float32 [C, tasks] of each request: item_ids, actions, timestamps [n], query_time [1],
    candidate_ids [C], all int64. Candidates know nothing of one another, so fewer are filled up and cut again."""
    count = max(len(one["candidate_ids"]) for one in requests)
    candidates = np.stack([np.resize(one["candidate_ids"], count) for one in requests])
    histories = histories_from_rows([cast(Mapping[str, Sequence[int]], one) for one in requests])
    feeds = {**histories.feeds(engine.config), "candidate_ids": candidates}
    check_feeds(engine.config, "rank", feeds)
    scores = np.asarray(engine.run("rank", feeds)["task_scores"], np.float32)
    return [scores[row, : len(one["candidate_ids"])] for row, one in enumerate(requests)]


def _serve_slates(connection: socket.socket, bundle: Bundle, details: Mapping[str, Any]) -> None:
    from serving.vllm_plugin.runtime import VllmRuntime
    from serving.vllm_plugin.stream import SlateStream

    stream = SlateStream(VllmRuntime(bundle.path, **details["options"]))
    connection.sendall(encode({"ready": True, "precision": "fp32", "fallback": None}, {}))
    while True:
        readable, _writable, _broken = select.select([connection], [], [], 0.0 if stream.running else None)
        if readable:
            message = receive_blocking(connection)
            if message is None:
                return
            header, arrays = message
            histories = histories_from_rows([cast(Mapping[str, Sequence[int]], arrays)])
            try:
                stream.add(header["id"], histories, header["num_items"], within_s=header["within_s"])
            except InputError as error:
                connection.sendall(encode({"id": header["id"], "error": str(error), "kind": "input"}, {}))
        for number, item_ids, scores in stream.step():
            connection.sendall(encode({"id": number}, {"item_ids": item_ids, "scores": scores}))


if __name__ == "__main__":
    main(sys.argv[1:])
