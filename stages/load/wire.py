"""A bare HTTP/1.1 connection: what a load generator can afford beside the server it loads."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from serving.client import SESSION_HEADER


class Wire:
    """One keep-alive connection, one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(
        self, method: str, path: str, body: Any = None, *, user: str = "", timeout_s: float = 30.0
    ) -> tuple[int, Any]:
        """Status and JSON; ConnectionError or TimeoutError when there is no answer."""
        async with asyncio.timeout(timeout_s):
            gone = self._reader is not None and self._reader.at_eof()  # closed while it was idle
            if self._writer is None or self._writer.is_closing() or gone:
                self.close()
                self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
            assert self._reader is not None
            content = b"" if body is None else json.dumps(body).encode()
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
                f"{SESSION_HEADER}: {user}\r\n"
                f"Content-Length: {len(content)}\r\n\r\n"
            )
            try:
                self._writer.write(head.encode() + content)
                header = await self._reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in header.split(b"\r\n"):
                    name, _, value = line.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                answer = await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                self.close()
                raise ConnectionError(f"the connection broke: {error}") from None
            except BaseException:
                self.close()
                raise
        return int(header[9:12]), json.loads(answer) if answer else None

    def close(self) -> None:
        """The connection is closed; the next request opens another."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    async def end(self) -> None:
        """The connection is closed, and the other side knows."""
        writer = self._writer
        self.close()
        if writer is not None:
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
