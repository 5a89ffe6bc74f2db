"""A returning user costs what is new: the state kept between visits, and the two functions that make and extend it.

Positions are absolute: row p of a cache is event p of the history. When a history outgrows the model
(`max_history`), its oldest events no longer count, every other moves, and no row can stay. The state is then
computed anew from the newest `max_history` events: the same answer that `retrieve` gives, at the price of a first
visit. `UserState.recomputed` counts how often that was, `UserState.forgotten` how many events no longer count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from hstu.data.histories import Histories, Int64s, histories_from_rows
from hstu.errors import ArtifactError, InputError
from hstu.signature import CacheForm, CacheSpec, cache_spec
from serving.bundle import Bundle
from serving.cache_rows import DTYPES, CacheRows
from serving.engine import Array, Engine, check_answers, check_feeds, open_engine

Answers = dict[str, Array]
_EVENTS = ("item_ids", "actions", "timestamps")
_MAGIC = b"HSTU user state 1\n"
_DIGEST = hashlib.sha256().digest_size
_ANEW = "start this user anew from the history"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a state was computed with. Rows of one origin mean nothing to another."""

    checkpoint: str  # artifact id
    engine: str  # its name in the bundle, such as int8-openvino
    precision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StatefulEngine:
    """An engine, what its states are stamped with, and the form that new states keep their rows in."""

    engine: Engine
    origin: Origin
    form: CacheForm = "fp32"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UserState:
    """One user between visits: the events that count, oldest first, and the cache rows of all but the last.

    item_ids, actions, timestamps: int64 [n], 1 <= n <= max_history; `rows` has n - 1 positions. Never changed:
    a visit makes another state, which shares memory with this one.
    """

    origin: Origin
    item_ids: Int64s
    actions: Int64s
    timestamps: Int64s
    rows: CacheRows
    forgotten: int = 0  # older events, which the model has no room for
    recomputed: int = 0  # times that all rows were computed anew because of that

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and the events."""
        return self.rows.nbytes + self.item_ids.nbytes + self.actions.nbytes + self.timestamps.nbytes


def open_stateful(
    bundle: Bundle, *, engine: str | None = None, form: CacheForm = "fp32", threads: int | None = None
) -> StatefulEngine:
    """An engine of a bundle (default: the bundle's choice), ready for `start` and `extend`."""
    name = bundle.engines[0] if engine is None else engine
    opened = open_engine(bundle.engine_folder(name), threads=threads)
    checkpoint = bundle.artifact.manifest["inputs"]["checkpoint"]
    origin = Origin(checkpoint=checkpoint, engine=name, precision=opened.precision)
    return StatefulEngine(engine=opened, origin=origin, form=form)


def start(stateful: StatefulEngine, histories: Histories) -> tuple[list[UserState], Answers]:
    """States of users seen for the first time, and the answers that `retrieve` gives them.

    Histories longer than the model takes are cut to their newest events. InputError for a user with no events.
    """
    spec = cache_spec(stateful.engine.config)
    none = np.zeros(0, dtype=np.int64)
    blank = UserState(
        origin=stateful.origin, item_ids=none, actions=none, timestamps=none, rows=CacheRows(spec, stateful.form)
    )
    if (histories.lengths == 0).any():
        raise InputError(
            "a user without events has no state",
            got=f"no events in rows {np.flatnonzero(histories.lengths == 0).tolist()}",
            fix="recommend popular items until the first event",
        )
    return _visit(stateful, [blank] * len(histories), histories)


def extend(stateful: StatefulEngine, states: Sequence[UserState], new: Histories) -> tuple[list[UserState], Answers]:
    """States and answers after new events, one row of `new` a state; a user may come back with none.

    The answers are those of `retrieve` on the whole history: user_embedding, top_item_ids, top_scores. Users are
    computed in one batch, padded to the longest cache; those whose history outgrew the model in another.
    Raises ArtifactError when a state is of another checkpoint, engine or precision, InputError when an event is
    older than those before it or unknown to the model; ArtifactError when rows lead to what is not a number.
    """
    if len(states) != len(new):
        raise InputError("states and new events are not of the same users", got=(len(states), len(new)))
    for state in states:
        _require_ours(stateful, state)
    return _visit(stateful, states, new)


def _require_ours(stateful: StatefulEngine, state: UserState) -> None:
    if state.origin != stateful.origin or state.rows.spec != cache_spec(stateful.engine.config):
        raise ArtifactError(
            "a user's state was made by another model or engine",
            got=f"{state.origin}, {state.rows.spec}",
            expected=f"{stateful.origin}, {cache_spec(stateful.engine.config)}",
            fix=_ANEW,
        )


def _visit(stateful: StatefulEngine, states: Sequence[UserState], new: Histories) -> tuple[list[UserState], Answers]:
    """Both kinds of visit: before the first one a state has no events."""
    users = [_with_events(stateful, state, new.select([row])) for row, state in enumerate(states)]
    outgrew = np.array([user.forgotten > state.forgotten for user, state in zip(users, states, strict=True)])
    answers: Answers = {}
    for group in (np.flatnonzero(~outgrew), np.flatnonzero(outgrew)):
        if len(group):
            after, found = _run(stateful, [users[row] for row in group], new.query_time[group])
            for row, user in zip(group, after, strict=True):
                users[row] = user
            for name, values in found.items():
                answers.setdefault(name, np.empty((len(users), *values.shape[1:]), values.dtype))[group] = values
    return users, answers


def _with_events(stateful: StatefulEngine, state: UserState, new: Histories) -> UserState:
    """The state with the events of the one user in `new`; its rows are those that still hold."""
    events = {name: np.concatenate([getattr(state, name), getattr(new, name)]) for name in _EVENTS}
    outgrown = len(events["item_ids"]) - stateful.engine.config.max_history
    if outgrown <= 0:
        return replace(state, **events)
    return replace(
        state,
        **{name: values[outgrown:] for name, values in events.items()},
        rows=CacheRows(state.rows.spec, state.rows.form),
        forgotten=state.forgotten + outgrown,
        recomputed=state.recomputed + (state.rows.length > 0),
    )


def _run(stateful: StatefulEngine, users: Sequence[UserState], query_time: Int64s) -> tuple[list[UserState], Answers]:
    """Answers, and states with a row for every event but the last."""
    config = stateful.engine.config
    rows = []
    for user, time in zip(users, query_time, strict=True):
        tail = {name: getattr(user, name)[user.rows.length :] for name in _EVENTS}
        rows.append({**tail, "query_time": [int(time)]})
    new = histories_from_rows(rows)
    feeds = {**new.feeds(config), **_cache_feeds(users)}
    check_feeds(config, "extend", feeds, finite=True)  # rows are checked when they are made
    answers = stateful.engine.run("extend", feeds)
    check_answers(stateful.engine, "extend", answers)
    made = answers.pop("cache_rows")
    after = [
        replace(user, rows=user.rows.append(made[row, :, : length - 1]))
        for row, (user, length) in enumerate(zip(users, new.lengths.tolist(), strict=True))
    ]
    return after, answers


def _cache_feeds(users: Sequence[UserState]) -> Answers:
    """The caches of all users in one tensor; of a single one as it lies there."""
    lengths = np.array([user.rows.length for user in users], dtype=np.int64)
    cache = users[0].rows.view() if len(users) == 1 else None
    if cache is not None:
        cache = cache[None]
    else:
        cache = np.zeros((len(users), *users[0].rows.spec.shape(max(1, int(lengths.max())))), np.float32)
        for row, user in enumerate(users):
            user.rows.read(cache[row])
    times = np.zeros((len(users), cache.shape[2]), np.int64)
    for row, user in enumerate(users):
        times[row, : lengths[row]] = user.timestamps[: lengths[row]]
    return {"cache": cache, "cached_timestamps": times, "cached_lengths": lengths}


def to_bytes(state: UserState) -> bytes:
    """The state as bytes that `from_bytes` reads on any machine: magic, header, events, rows, SHA-256."""
    header = json.dumps(
        {
            **asdict(state.origin),
            **asdict(state.rows.spec),
            "form": state.rows.form,
            "events": len(state.item_ids),
            "rows": state.rows.length,
            "forgotten": state.forgotten,
            "recomputed": state.recomputed,
        },
        sort_keys=True,
    ).encode()
    events = b"".join(getattr(state, name).astype("<i8", copy=False).tobytes() for name in _EVENTS)
    body = _MAGIC + len(header).to_bytes(4, "little") + header + events + state.rows.to_bytes()
    return body + hashlib.sha256(body).digest()


def from_bytes(data: bytes) -> UserState:
    """The state that `to_bytes` wrote; ArtifactError when a byte differs, or it is not one."""
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    start = len(_MAGIC) + 4
    if body[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != digest:
        raise ArtifactError("not a user's state, or not as it was written", expected=f"{_MAGIC!r} …", fix=_ANEW)
    end = start + int.from_bytes(body[len(_MAGIC) : start], "little")
    try:
        header = json.loads(body[start:end])
        origin = Origin(**{field.name: header[field.name] for field in fields(Origin)})
        spec = CacheSpec(**{field.name: header[field.name] for field in fields(CacheSpec)})
        form, count, length = header["form"], header["events"], header["rows"]
        kept = {name: header[name] for name in ("forgotten", "recomputed")}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"not a user's state: malformed header ({error!r})", fix=_ANEW) from None
    sizes = [count, length, *asdict(spec).values(), *kept.values()]
    whole = all(type(size) is int and size >= 0 for size in sizes) and form in DTYPES
    rows_at = end + 8 * count * len(_EVENTS) if whole else 0
    if not whole or not 0 <= length < count <= spec.max_positions + 1 or len(body) < rows_at:
        raise ArtifactError("not a user's state: a header that makes no sense", got=header, fix=_ANEW)
    events = np.frombuffer(body[end:rows_at], "<i8").astype(np.int64).reshape(len(_EVENTS), count)
    rows = CacheRows.from_bytes(body[rows_at:], spec, form, length)
    item_ids, actions, timestamps = events
    return UserState(origin=origin, item_ids=item_ids, actions=actions, timestamps=timestamps, rows=rows, **kept)
