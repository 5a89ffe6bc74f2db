"""The doors of a bundle's server: what a request may be is checked here, before vLLM parses it.

vLLM's own parser answers some malformed requests with a 500, and some of what it offers for words would be ignored
without a word. So a field of another type, a field that slates have no use for, and a route that a recommender does
not serve are refused first, with a 4xx that says what is wrong. Values are vLLM's and the renderer's to check.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import torch

from serving.vllm_plugin.constraints import LISTS, SWITCHES

MAX_BODY_BYTES = 16 << 20
MAX_SLATES = 256  # prompts of one request, and slates of one prompt
_INT64 = 2**63
_NO_TENSOR = (  # what zipfile, pickle and torch say of bytes that are no tensor: they have no one error for it
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
    EOFError, OSError, pickle.PickleError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Check = Callable[[Any], bool]


class RefusedError(Exception):
    """The request is answered with `status` and this text; `field` is what is wrong."""

    def __init__(self, message: str, *, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field, self.status = field, status


def _whole(low: int, high: int) -> tuple[Check, str]:
    return (lambda v: type(v) is int and low <= v <= high), f"a whole number {low}..{high}"


def _number(low: float, high: float) -> tuple[Check, str]:
    return (lambda v: type(v) in (int, float) and low <= v <= high), f"a number {low}..{high}"


def _text(longest: int) -> tuple[Check, str]:
    return (lambda v: isinstance(v, str) and 1 <= len(v) <= longest), f"text of 1..{longest} characters"


def _one_of(*values: str) -> tuple[Check, str]:
    return (lambda v: isinstance(v, str) and v in values), f"one of {', '.join(values)}"


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item < 2**31 for item in value)


def _is_prompt(value: Any) -> bool:
    one = isinstance(value, str) or _is_ids(value)
    return one or (
        isinstance(value, list)
        and 1 <= len(value) <= MAX_SLATES
        and (all(map(_is_ids, value)) or all(isinstance(text, str) for text in value))
    )


def _is_logit_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        item.isascii() and item.isdigit() and len(item) < 11 and type(bias) in (int, float) and abs(bias) <= 100
        for item, bias in value.items()
    )


def _is_stream_options(value: Any) -> bool:
    known = {"include_usage", "continuous_usage_stats"}
    return isinstance(value, dict) and set(value) <= known and all(type(v) is bool for v in value.values())


def _is_constraint(value: Any) -> bool:
    return isinstance(value, dict) and set(value) <= set(LISTS + SWITCHES)


_FLAG: tuple[Check, str] = ((lambda v: type(v) is bool), "true or false")
_PROMPT: tuple[Check, str] = (
    _is_prompt,
    f"item ids, as [12, 7] or '12 7', or a list of 1..{MAX_SLATES} such prompts",
)
_COMMON: dict[str, tuple[Check, str]] = {
    "model": _text(1000),
    "user": _text(1000),
    "request_id": _text(100),
    "cache_salt": _text(100),
}
_EMBEDDING = _COMMON | {
    "input": _PROMPT,
    "encoding_format": _one_of("float", "base64"),
}
# Door → the fields it takes; what null means is left to vLLM.
DOORS: Mapping[str, Mapping[str, tuple[Check, str]]] = {
    "/v1/completions": _COMMON
    | {
        "prompt": _PROMPT,
        "prompt_embeds": (lambda v: isinstance(v, str) or _is_texts(v), "base64 of torch.save of records, or a list"),
        "max_tokens": _whole(1, 2**31 - 1),
        "n": _whole(1, MAX_SLATES),
        "temperature": _number(0, 1000),
        "top_p": _number(0, 1),
        "top_k": _whole(-1, 2**31 - 1),
        "min_p": _number(0, 1),
        "seed": _whole(-_INT64, _INT64 - 1),
        "logprobs": _whole(0, 2**31 - 1),
        "logit_bias": (_is_logit_bias, "an object of item ids and numbers -100..100"),
        "stop_token_ids": (lambda v: v == [] or _is_ids(v), "a list of item ids"),
        "stream": _FLAG,
        "stream_options": (_is_stream_options, "an object of include_usage and continuous_usage_stats"),
        "ignore_eos": _FLAG,
        "return_token_ids": _FLAG,
        "return_tokens_as_token_ids": _FLAG,
        "vllm_xargs": (_is_constraint, f"an object of {', '.join(LISTS + SWITCHES)}"),
    },
    "/v1/embeddings": _EMBEDDING,
    "/pooling": _EMBEDDING | {"task": _one_of("embed", "plugin"), "data": (lambda _: True, "")},
}
# What clients of language models send without meaning anything by it: field → the values that change nothing.
_IDLE: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,), "suffix": ("",), "best_of": (1,), "stop": ("", []), "use_beam_search": (False,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "min_tokens": (0,), "priority": (0,), "bad_words": ([],), "response_format": ({"type": "text"},),
    "include_stop_str_in_output": (False,), "add_special_tokens": (True, False),
    "skip_special_tokens": (True, False), "spaces_between_special_tokens": (True, False),
}  # fmt: skip


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= MAX_SLATES and all(isinstance(v, str) for v in value)


def read_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body; RefusedError says why there is none."""

    def no_number(name: str) -> float:
        raise RefusedError(f"the body holds {name}, which is no number")

    try:
        body = json.loads(raw, parse_constant=no_number)
        if b"\\u" in raw:
            json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair is text to JSON, and to none other
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise RefusedError("the body must be a JSON object")
    return body


def check_body(door: str, body: Mapping[str, Any]) -> None:
    """RefusedError unless `door` takes these fields, each of its type."""
    fields = DOORS[door]
    for name, value in body.items():
        if name in fields:
            check, expected = fields[name]
            if value is not None and not check(value):
                raise RefusedError(f"{name} must be {expected}", field=name)
        elif value is not None and not any(
            value == idle and isinstance(value, bool) == isinstance(idle, bool) for idle in _IDLE.get(name, ())
        ):
            raise RefusedError(
                f"{door} has no use for {name[:40]!r}; it takes {', '.join(sorted(fields))}", field=name[:40]
            )
    asked = {"/v1/completions": ("prompt", "prompt_embeds"), "/pooling": ("data", "input")}.get(door, ("input",))
    given = [name for name in asked if body.get(name) not in (None, "")]
    if len(given) != 1 and not (door == "/pooling" and "data" in body and len(given) == 0):
        raise RefusedError(f"give {' or '.join(asked)}, and not both", field=asked[0])
    if "prompt_embeds" in given:
        rows = body["prompt_embeds"]
        for one in rows if isinstance(rows, list) else [rows]:
            _check_rows(one)


def _check_rows(text: str) -> None:
    """RefusedError unless this is base64 of a plain tensor of floats that is no larger than what was sent."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            if sum(member.file_size for member in archive.infolist()) > 2 * len(raw):
                raise RefusedError("prompt_embeds unpacks to more than was sent", field="prompt_embeds")
        rows = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
    except _NO_TENSOR as error:
        raise RefusedError(
            f"prompt_embeds is not base64 of torch.save of a tensor ({type(error).__name__})", field="prompt_embeds"
        ) from None
    plain = isinstance(rows, torch.Tensor) and rows.layout == torch.strided and rows.is_floating_point()
    if not plain or not rows.is_contiguous() or rows.dim() != 2 or not rows.numel():
        raise RefusedError("prompt_embeds must be a contiguous tensor of floats [events, width]", field="prompt_embeds")


class Doors:
    """An ASGI application around vLLM's: what `check_body` refuses never reaches it."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from vllm import envs

        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            if path not in DOORS:
                if not envs.VLLM_SERVER_DEV_MODE:  # for operators: nothing of it is open otherwise
                    raise RefusedError(f"there is no {path[:80]!r} here: POST to {', '.join(DOORS)}", status=404)
                await self._app(scope, receive, send)
                return
            raw = await _read(receive)
            if raw is None:
                return
            check_body(path, read_body(raw))
        except RefusedError as refusal:
            await _refuse(send, refusal)
            return
        await self._app(scope, _replay(raw, receive), send)


async def _read(receive: Receive) -> bytes | None:
    """The whole body, None when the client has gone."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise RefusedError(f"the body is longer than {MAX_BODY_BYTES} bytes", status=413)
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(raw: bytes, receive: Receive) -> Receive:
    """What hands the body over at once, then whatever comes (a client that goes away)."""
    bodies = [raw]

    async def replay() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": bodies.pop(), "more_body": False} if bodies else await receive()

    return replay


async def _refuse(send: Send, refusal: RefusedError) -> None:
    """The answer has the form of vLLM's own errors."""
    kind = {404: "NotFoundError", 413: "RequestEntityTooLargeError"}.get(refusal.status, "BadRequestError")
    error = {"message": str(refusal), "type": kind, "param": refusal.field, "code": refusal.status}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def guard_server() -> None:
    """Where this process is vLLM's server, HSTU's doors stand before its routes, behind its API keys."""
    server: Any = sys.modules.get("vllm.entrypoints.launchers.app")
    if server is None or getattr(server, "_hstu_doors", False):
        return
    middleware: Callable[..., None] = server.init_entrypoints_middleware

    def with_doors(args: Any, app: Any, *rest: Any, **options: Any) -> None:
        app.add_middleware(Doors)
        middleware(args, app, *rest, **options)

    server.init_entrypoints_middleware, server._hstu_doors = with_doors, True
