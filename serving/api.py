"""The HTTP routes of the service. Everything they do is in `serving.service`; here is what HTTP makes of it."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import StringConstraints
from starlette.exceptions import HTTPException

from hstu.errors import CompilerError, UsageError
from serving.batching import BusyError, LateError
from serving.bundle import Bundle
from serving.fallback import UnavailableError
from serving.guard import Guard
from serving.schemas import (
    BatchAnswer,
    BatchEntry,
    BatchRequest,
    DeletedAnswer,
    EventsAnswer,
    EventsRequest,
    Problem,
    RecommendAnswer,
    RecommendRequest,
    ScoreAnswer,
    ScoreRequest,
)
from serving.service import Service
from serving.settings import ServiceSettings
from serving.telemetry import Telemetry
from serving.users import UnknownUserError

UserPath = Annotated[str, Path(), StringConstraints(pattern=r"^[A-Za-z0-9_.:@\-]{1,128}$")]
MAX_BODY_BYTES = 4 << 20
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "Wrong in itself: an unknown item, events out of order."},
    401: {"model": Problem, "description": "No API key, or an unknown one."},
    404: {"model": Problem, "description": "No events of this user are known."},
    408: {"model": Problem, "description": "The request's own deadline has passed."},
    413: {"model": Problem, "description": "The body is too long."},
    422: {"model": Problem, "description": "Not of the schema."},
    429: {"model": Problem, "description": "The queue is full; Retry-After says when to ask again."},
    503: {"model": Problem, "description": "Nothing that could answer is up; Retry-After."},
}


def build_app(
    bundle: Bundle,
    settings: ServiceSettings,
    *,
    keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    new_service: Callable[[Bundle, ServiceSettings], Service] = Service,
) -> Guard:
    """The application that serves a bundle; it opens the runtimes when the server starts it."""
    state: dict[str, Any] = {}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = new_service(bundle, settings)
        state["service"], state["telemetry"] = service, Telemetry(service)
        app.state.service = service
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="HSTU recommender",
        version=str(bundle.description.get("version", "0")),
        summary="Recommendations, scores and users of one compiled bundle.",
        lifespan=lifespan,
    )
    _handle_errors(app)
    _add_routes(app, lambda: state["service"], lambda: state["telemetry"])
    return Guard(app, keys=keys, max_body_bytes=max_body_bytes, telemetry=lambda: state.get("telemetry"))


def problem(error: CompilerError) -> tuple[int, dict[str, str]]:
    """The status and headers that an error becomes."""
    if isinstance(error, (BusyError, UnavailableError)):
        status = 429 if isinstance(error, BusyError) else 503
        return status, {"Retry-After": str(math.ceil(error.retry_after_s))}
    if isinstance(error, UnknownUserError):
        return 404, {}
    if isinstance(error, LateError):
        return 408, {}
    return (400 if isinstance(error, UsageError) else 503), {}


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, media_type="application/json")  # ASCII: any text may be echoed


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(CompilerError)
    async def ours(_: Request, error: CompilerError) -> Response:
        status, headers = problem(error)
        return _json(status, {"error": str(error)}, headers)

    @app.exception_handler(RequestValidationError)
    async def not_of_the_schema(_: Request, error: RequestValidationError) -> Response:
        found = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:10]]
        return _json(422, {"error": "\n".join(found)})  # where and why, not what was sent

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        return _json(error.status_code, {"error": str(error.detail)}, dict(error.headers or {}))


def _add_routes(app: FastAPI, service: Callable[[], Service], telemetry: Callable[[], Telemetry]) -> None:
    @app.post("/v1/recommend", responses=_PROBLEMS, tags=["recommend"])
    async def recommend(request: RecommendRequest) -> RecommendAnswer:
        """The best items for a history, or for a known user."""
        return await service().recommend(request)

    @app.post("/v1/recommend/batch", responses=_PROBLEMS, tags=["recommend"])
    async def recommend_batch(batch: BatchRequest) -> BatchAnswer:
        """Many at once; each has its own status."""
        arrived = time.monotonic()

        async def one(request: RecommendRequest) -> BatchEntry:
            try:
                return BatchEntry(status=200, answer=await service().recommend(request, arrived=arrived))
            except CompilerError as error:
                return BatchEntry(status=problem(error)[0], error=str(error))

        return BatchAnswer(answers=list(await asyncio.gather(*(one(request) for request in batch.requests))))

    @app.post("/v1/score", responses=_PROBLEMS, tags=["recommend"])
    async def score(request: ScoreRequest) -> ScoreAnswer:
        """How likely engagement, retention and monetisation are, for each candidate."""
        return await service().score(request)

    @app.post("/v1/users/{user_id}/events", responses=_PROBLEMS, tags=["users"])
    async def add_events(user_id: UserPath, request: EventsRequest) -> EventsAnswer:
        """What the user did; the next recommendation knows it."""
        return EventsAnswer(user_id=user_id, num_events=await service().add_events(user_id, request.events))

    @app.delete("/v1/users/{user_id}", responses=_PROBLEMS, tags=["users"])
    async def delete_user(user_id: UserPath) -> DeletedAnswer:
        """Events and state of the user are gone."""
        return DeletedAnswer(user_id=user_id, deleted=await service().delete_user(user_id))

    @app.get("/health", tags=["operations"])
    async def health() -> dict[str, str]:
        """The process runs."""
        return {"status": "ok"}

    @app.get("/ready", tags=["operations"], responses={503: {"model": Problem}})
    async def ready() -> Response:
        """The engine answers. Workers that are down are named; others answer for them."""
        found = service()
        workers = {name: worker.ready for name, worker in found.runtimes.workers.items()}
        return _json(200 if found.runtimes.ready else 503, {"ready": found.runtimes.ready, "workers": workers})

    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(telemetry().registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/bundle", tags=["operations"])
    async def bundle() -> dict[str, Any]:
        """What is served: the manifest, the runtimes and their precisions."""
        found = service()
        return {
            "id": found.bundle.artifact.id,
            "manifest": found.bundle.artifact.manifest,
            "model": found.bundle.config.to_dict(),
            "runtimes": [
                {
                    "name": lane.name,
                    "open": lane.stateful is not None,
                    "precision": found.runtimes.precision(lane.name) if lane.stateful is not None else None,
                    "circuit": lane.breaker.state,
                }
                for lane in found.runtimes.lanes.values()
            ],
            "workers": {name: {"ready": w.ready, "restarts": w.restarts} for name, w in found.runtimes.workers.items()},
            "strict": found.settings.strict,
        }
