"""Requests for users' states as they come in time: what cache policies are compared on, drawn anew for each seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hstu.data.reference_log import reference_log

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_USERS, _REQUESTS = 8000, 120_000
_BETWEEN_S = 0.05  # mean time between requests of all users together
_SKEW = 0.9
_BYTES_PER_EVENT = 2048  # of a state: 2 layers of 256 float32
_DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Requests in order of time: float64 seconds, int64 users 0..U-1 and the bytes of each user's state."""

    time_s: Floats
    users: Ints
    nbytes: Ints

    @property
    def footprint(self) -> int:
        """Bytes of all states together."""
        _, first = np.unique(self.users, return_index=True)
        return int(self.nbytes[first].sum())


def _sizes(rng: np.random.Generator, users: int) -> Ints:
    """Histories of 6 to 200 events, log-normal around 37."""
    return (np.clip(rng.lognormal(3.6, 0.7, users), 6, 200).astype(np.int64) * _BYTES_PER_EVENT).astype(np.int64)


def _zipf_law(users: int) -> Floats:
    weights = np.arange(1, users + 1) ** -_SKEW
    return np.asarray(weights / weights.sum(), np.float64)


def _steady(rng: np.random.Generator, users: Ints) -> Trace:
    sizes = _sizes(rng, int(users.max()) + 1)
    return Trace(time_s=np.cumsum(rng.exponential(_BETWEEN_S, len(users))), users=users, nbytes=sizes[users])


def zipf(seed: int = 1) -> Trace:
    """Every request is a draw from one Zipf law (exponent 0.9)."""
    rng = np.random.default_rng([seed, 1])
    return _steady(rng, rng.choice(_USERS, _REQUESTS, p=_zipf_law(_USERS)))


def drifting(seed: int = 1) -> Trace:
    """Zipf, but sixty times a twentieth of the users change places."""
    rng = np.random.default_rng([seed, 2])
    ranks, parts = rng.permutation(_USERS), []
    for _ in range(60):
        parts.append(ranks[rng.choice(_USERS, _REQUESTS // 60, p=_zipf_law(_USERS))])
        some = rng.choice(_USERS, _USERS // 20, replace=False)
        ranks[some] = ranks[rng.permutation(some)]
    return _steady(rng, np.concatenate(parts))


def scanning(seed: int = 1) -> Trace:
    """Zipf, and twelve times a batch job asks for 2 500 users whom nobody asks for again."""
    rng = np.random.default_rng([seed, 3])
    part, parts, fresh = _REQUESTS // 12, [], _USERS
    for _ in range(12):
        parts += [rng.choice(_USERS, part * 3 // 4, p=_zipf_law(_USERS)), np.arange(fresh, fresh + part // 4)]
        fresh += part // 4
    return _steady(rng, np.concatenate(parts).astype(np.int64))


def diurnal(seed: int = 1) -> Trace:
    """Ten days; users come at their own hour (morning, noon or evening), some daily, some weekly, in sessions."""
    rng, users = np.random.default_rng([seed, 4]), 6000
    hour = rng.choice([8.0, 13.0, 20.0], users, p=[0.3, 0.3, 0.4]) + rng.normal(0, 1, users)
    visits_per_day = np.clip(rng.lognormal(-0.7, 0.8, users), 0.05, 6.0)
    times, who = [], []
    for day in range(10):
        visitors = np.repeat(np.arange(users), rng.poisson(visits_per_day))
        start = day * _DAY_S + (hour[visitors] + rng.normal(0, 1, len(visitors))) % 24 * 3600.0
        requests = 1 + rng.geometric(0.5, len(visitors))
        who.append(np.repeat(visitors, requests))
        times.append(np.repeat(start, requests) + rng.exponential(90.0, int(requests.sum())))
    return _in_order(np.concatenate(times), np.concatenate(who), _sizes(rng, users))


def reference(seed: int = 1) -> Trace:
    """Every event of 4 000 users of the reference log (`hstu.data.reference_log`) is a request."""
    log, _ = reference_log(num_users=4000, num_items=1000, events_per_user=40, seed=seed)
    return _in_order(log.timestamps.astype(np.float64), log.users, np.diff(log.offsets) * _BYTES_PER_EVENT)


def _in_order(time_s: Floats, users: Ints, sizes: Ints) -> Trace:
    order = np.argsort(time_s, kind="stable")
    return Trace(time_s=time_s[order], users=users[order], nbytes=sizes[users[order]])


TRACES: Mapping[str, Callable[[int], Trace]] = MappingProxyType(
    {"zipf": zipf, "drifting": drifting, "scanning": scanning, "diurnal": diurnal, "reference": reference}
)
