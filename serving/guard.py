"""What a request must pass before it is read: its size, and a key where keys are asked for. Counts and times all."""

from __future__ import annotations

import contextlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from serving.telemetry import Telemetry

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN_PATHS = frozenset({"/health", "/ready"})  # for probes, which have no key


class TooLargeError(Exception):
    """The body is longer than allowed."""


class Guard:
    """An ASGI application around another."""

    def __init__(
        self, app: Application, *, keys: Sequence[str], max_body_bytes: int, telemetry: Callable[[], Telemetry | None]
    ) -> None:
        self._app, self._max_body, self._telemetry = app, max_body_bytes, telemetry
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if too_large:  # whatever the application makes of a body it could not read
                return
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def refuse_size() -> None:
            nonlocal status
            status = 413
            await _refuse(send, 413, f"the body is longer than {self._max_body} bytes")

        seen, too_large = 0, False

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal seen, too_large
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body:
                too_large = True
                raise TooLargeError
            return message

        try:
            if self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
                await _refuse(sending, 401, "this server asks for an API key: Authorization: Bearer KEY")
            elif _declared_length(scope) > self._max_body:
                await refuse_size()
            else:
                with contextlib.suppress(TooLargeError):
                    await self._app(scope, receiving, sending)
                if too_large:
                    await refuse_size()
        finally:
            telemetry = self._telemetry()
            if telemetry is not None:
                route = getattr(scope.get("route"), "path", "unmatched")
                telemetry.requests.labels(route, str(status)).inc()
                telemetry.seconds.labels(route).observe(time.perf_counter() - began)

    def _has_key(self, scope: Scope) -> bool:
        given = _header(scope, b"authorization")
        kind, _, key = given.partition(b" ")
        if kind.lower() != b"bearer":
            return False
        matching = sum(hmac.compare_digest(key.strip(), known) for known in self._keys)  # all, so time tells nothing
        return matching > 0


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")


def _declared_length(scope: Scope) -> int:
    value = _header(scope, b"content-length")
    return int(value) if value.isdigit() else 0


async def _refuse(send: Send, status: int, error: str) -> None:
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
