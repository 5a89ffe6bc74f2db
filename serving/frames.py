"""Messages between our processes: a JSON header and raw arrays, with lengths in front. Nothing is ever unpickled."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from hstu.errors import ArtifactError
from serving.engine import Array

_PREFIX = struct.Struct("<IQ")  # bytes of the header, bytes of the arrays
_LONGEST_HEADER, _LONGEST_BODY = 1 << 20, 1 << 31
_DTYPES = ("int64", "float32")


def encode(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """The message as bytes."""
    described = [{"name": name, "dtype": str(a.dtype), "shape": a.shape} for name, a in arrays.items()]
    head = json.dumps({**header, "arrays": described}).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    return _PREFIX.pack(len(head), len(body)) + head + body


def decode(head: bytes | bytearray, body: bytes | bytearray) -> tuple[dict[str, Any], dict[str, Array]]:
    """The header and the arrays, which may be written to; ArtifactError when they do not fit one another."""
    header = json.loads(head)
    arrays: dict[str, Array] = {}
    start = 0
    for one in header.pop("arrays"):
        if one["dtype"] not in _DTYPES:
            raise ArtifactError("a message between processes has a type that is not used", got=one["dtype"])
        count = int(np.prod(one["shape"], dtype=np.int64))
        array = np.frombuffer(body, one["dtype"], count=count, offset=start).reshape(one["shape"])
        arrays[one["name"]] = array
        start += array.nbytes
    return header, arrays


async def receive(reader: asyncio.StreamReader) -> tuple[dict[str, Any], dict[str, Array]]:
    """The next message; asyncio.IncompleteReadError when the other side is gone."""
    head, body = _checked(await reader.readexactly(_PREFIX.size))
    return decode(await reader.readexactly(head), bytearray(await reader.readexactly(body)))


def receive_blocking(connection: socket.socket) -> tuple[dict[str, Any], dict[str, Array]] | None:
    """The next message; None when the other side is gone."""
    prefix = _exactly(connection, _PREFIX.size)
    if prefix is None:
        return None
    head, body = _checked(prefix)
    parts = [_exactly(connection, head), _exactly(connection, body)]
    if parts[0] is None or parts[1] is None:
        return None
    return decode(parts[0], parts[1])


def _checked(prefix: bytes | bytearray) -> tuple[int, int]:
    head, body = _PREFIX.unpack(prefix)
    if head > _LONGEST_HEADER or body > _LONGEST_BODY:
        raise ArtifactError("a message between processes is too long", got=(head, body))
    return head, body


def _exactly(connection: socket.socket, count: int) -> bytearray | None:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return parts
