"""An asynchronous client of the service: typed answers, errors as exceptions, patience where the server asks for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from hstu.errors import CompilerError
from serving.schemas import (
    BatchAnswer,
    BatchRequest,
    DeletedAnswer,
    Event,
    EventsAnswer,
    EventsRequest,
    RecommendAnswer,
    RecommendRequest,
    ScoreAnswer,
    ScoreRequest,
)

A = TypeVar("A", bound=BaseModel)
SESSION_HEADER = "x-session-id"  # the user, for whom many replicas stand behind one port: one replica has the state
_WORTH_ANOTHER_TRY = (429, 503)


class ServiceError(CompilerError):
    """The service did not answer the request; `status` is HTTP's."""

    exit_code = 2

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error, got=f"status {status}")
        self.status = status


class Client:
    """All routes of one service. Asks again after 429 and 503, when the server says and `patience_s` allows."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, key: str | None = None, patience_s: float = 5.0, **options: Any
    ) -> None:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, **({"timeout": 30.0} | options))
        self._patience_s = patience_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def recommend(self, **request: Any) -> RecommendAnswer:
        """The best items for `events` or a known `user_id`; fields of RecommendRequest."""
        return await self._post("/v1/recommend", RecommendRequest(**request), RecommendAnswer, request.get("user_id"))

    async def recommend_batch(self, requests: Sequence[RecommendRequest]) -> BatchAnswer:
        """Many at once, each with its own status."""
        return await self._post("/v1/recommend/batch", BatchRequest(requests=list(requests)), BatchAnswer)

    async def score(self, **request: Any) -> ScoreAnswer:
        """Task probabilities of `candidates`; fields of ScoreRequest."""
        return await self._post("/v1/score", ScoreRequest(**request), ScoreAnswer, request.get("user_id"))

    async def add_events(self, user_id: str, events: Sequence[Event]) -> EventsAnswer:
        """The user did this."""
        return await self._post(
            f"/v1/users/{user_id}/events", EventsRequest(events=list(events)), EventsAnswer, user_id
        )

    async def delete_user(self, user_id: str) -> DeletedAnswer:
        """The user is forgotten."""
        return DeletedAnswer.model_validate_json((await self._ask("DELETE", f"/v1/users/{user_id}")).content)

    async def health(self) -> bool:
        """Whether the process runs."""
        return (await self._http.get("/health")).status_code == 200

    async def ready(self) -> dict[str, Any]:
        """Whether it answers, and which workers are up."""
        return dict((await self._http.get("/ready")).json())

    async def bundle(self) -> dict[str, Any]:
        """What is served."""
        return dict((await self._ask("GET", "/v1/bundle")).json())

    async def metrics(self) -> str:
        """Prometheus' text."""
        return (await self._ask("GET", "/metrics")).text

    async def _post(self, path: str, body: BaseModel, answer: type[A], user_id: str | None = None) -> A:
        content = body.model_dump_json(exclude_none=True)
        headers = {"content-type": "application/json"} | ({} if user_id is None else {SESSION_HEADER: user_id})
        return answer.model_validate_json((await self._ask("POST", path, content=content, headers=headers)).content)

    async def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        left = self._patience_s
        while True:
            response = await self._http.request(method, path, **options)
            if response.is_success:
                return response
            wait = float(response.headers.get("retry-after", 0.1)) * random.uniform(0.8, 1.2)
            if response.status_code not in _WORTH_ANOTHER_TRY or wait > left:
                raise ServiceError(response.status_code, response.json().get("error", response.text))
            left -= wait
            await asyncio.sleep(wait)
