"""A process that does one kind of work for the service: `python -m serving.worker ROLE BUNDLE FD DETAILS`.

ranker: `rank` of one of the bundle's engines. slates: greedy slates by vLLM, batched continuously: a request joins
those that are running at the next step, and is answered when its own slate is done.

It ends when the service does (the socket closes). Messages are those of `serving.frames`.
"""

from __future__ import annotations

import json
import select
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from hstu.data.histories import histories_from_rows
from hstu.errors import CompilerError, InputError
from serving.bundle import Bundle, open_bundle
from serving.engine import Array, check_feeds, open_engine
from serving.engine_order import open_default
from serving.frames import encode, receive_blocking

Arrays = Mapping[str, Array]


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

    def rank(feeds: Arrays) -> Arrays:
        check_feeds(opened.config, "rank", feeds)
        return opened.run("rank", feeds)

    while (message := receive_blocking(connection)) is not None:
        header, arrays = message
        connection.sendall(_answer(header["id"], lambda arrays=arrays: rank(arrays)))  # type: ignore[misc]


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
                stream.add(header["id"], histories, header["num_items"])
            except InputError as error:
                connection.sendall(encode({"id": header["id"], "error": str(error), "kind": "input"}, {}))
        for number, item_ids, scores in stream.step():
            connection.sendall(encode({"id": number}, {"item_ids": item_ids, "scores": scores}))


def _answer(number: int, compute: Callable[[], Arrays]) -> bytes:
    """The answer, or what is wrong with the request; anything else ends this process."""
    try:
        return encode({"id": number}, {name: np.asarray(a, np.float32) for name, a in compute().items()})
    except CompilerError as error:
        kind: Any = "input" if isinstance(error, InputError) else "other"
        return encode({"id": number, "error": str(error), "kind": kind}, {})


if __name__ == "__main__":
    main(sys.argv[1:])
