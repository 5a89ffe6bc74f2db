"""What goes in and out of the HTTP service: every field typed and bounded, unknown fields refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, StringConstraints

from hstu.signature import MAX_CANDIDATES, MAX_RESULTS
from serving.requests import Request

MAX_EVENTS, MAX_BATCH_REQUESTS, MAX_LISTED = 4096, 64, 1000
_INT64_MAX = 2**63 - 1

StrategyName = Literal["auto", "engine", "vllm", "unified", "torch"]
UserId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:@\-]{1,128}$", strict=True)]
ItemId = Annotated[str, StringConstraints(min_length=1, max_length=256, strict=True)] | StrictInt
Seconds = Annotated[StrictInt, Field(ge=0, le=_INT64_MAX)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Event(Model):
    """One thing a user did."""

    item_id: ItemId
    timestamp: Seconds = Field(description="seconds since 1970")
    action: Annotated[str, StringConstraints(max_length=64, strict=True)] | None = None


Events = Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS)]


class Filters(Model):
    """Which of the candidates may be answered."""

    exclude_seen: bool = Field(default=False, description="leave out the items of the history")
    exclude_items: list[ItemId] = Field(default_factory=list, max_length=MAX_LISTED)
    only_items: list[ItemId] | None = Field(default=None, max_length=MAX_LISTED)


class TaskWeights(Model):
    """What a ranked item's score is made of: the weighted mean of its task probabilities."""

    engagement: FiniteFloat = Field(default=1.0, ge=0.0, le=1000.0)
    retention: FiniteFloat = Field(default=1.0, ge=0.0, le=1000.0)
    monetisation: FiniteFloat = Field(default=1.0, ge=0.0, le=1000.0)


class RecommendRequest(Model):
    """A history, oldest event first, or a user whose events the service has."""

    user_id: UserId | None = None
    events: Events | None = None
    query_timestamp: Seconds | None = None
    k: int = Field(default=10, ge=1, le=MAX_RESULTS)
    strategy: StrategyName = "auto"
    candidates_from: Literal["engine", "vllm"] = Field(default="engine", description="of strategy unified")
    filters: Filters = Field(default_factory=lambda: Filters())
    task_weights: TaskWeights = Field(default_factory=lambda: TaskWeights())
    deadline_ms: int | None = Field(default=None, ge=1, le=60_000)


class BatchRequest(Model):
    requests: list[RecommendRequest] = Field(min_length=1, max_length=MAX_BATCH_REQUESTS)


class ScoreRequest(Model):
    """A history, or a known user, and the items to be scored."""

    user_id: UserId | None = None
    events: Events | None = None
    query_timestamp: Seconds | None = None
    candidates: list[ItemId] = Field(min_length=1, max_length=MAX_CANDIDATES)
    similarity: bool = Field(default=False, description="add each candidate's cosine with the user's embedding")
    deadline_ms: int | None = Field(default=None, ge=1, le=60_000)


class EventsRequest(Model):
    events: Events


class FallbackInfo(BaseModel):
    level: Literal["engine", "generation", "ranking"]
    wanted: str
    used: str
    reason: str


class Timing(BaseModel):
    queue_ms: float
    compute_ms: float
    total_ms: float


class Served(BaseModel):
    """How an answer came about."""

    strategy: Literal["engine", "vllm", "unified", "torch"]
    runtime: str = Field(description="who computed the candidates: an engine of the bundle, torch, or vllm")
    precision: str
    ranker: str | None = Field(default=None, description="who ranked them")
    cache: Literal["none", "miss", "hit"] = Field(description="the user's state")
    timing: Timing
    fallbacks: list[FallbackInfo]
    bundle: str


class Item(BaseModel):
    item_id: str | int
    score: float
    tasks: dict[str, float] | None = None


class RecommendAnswer(BaseModel):
    user_id: str | None
    items: list[Item]
    served: Served


class Problem(BaseModel):
    """What is wrong, in one line or more."""

    error: str


class BatchEntry(BaseModel):
    """An answer or what is wrong with this request of the batch."""

    status: int
    answer: RecommendAnswer | None = None
    error: str | None = None


class BatchAnswer(BaseModel):
    answers: list[BatchEntry]


class ScoredItem(BaseModel):
    item_id: str | int
    tasks: dict[str, float]
    similarity: float | None = None


class ScoreAnswer(BaseModel):
    user_id: str | None
    items: list[ScoredItem]
    served: Served


class EventsAnswer(BaseModel):
    user_id: str
    num_events: int = Field(description="of this user, all told")


class DeletedAnswer(BaseModel):
    user_id: str
    deleted: bool


def to_request(user_id: str | None, events: list[Event], query_timestamp: int | None) -> Request:
    """The events as the rest of the package takes requests."""
    return Request(
        user_id=user_id or "anonymous",
        item_ids=[event.item_id for event in events],
        timestamps=[event.timestamp for event in events],
        actions=[event.action for event in events],
        query_timestamp=query_timestamp,
    )
