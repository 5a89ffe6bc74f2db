"""The three outcomes of every event, by rule, where the log tells enough: 1, 0, or -1 for not known."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from hstu.config import TASKS
from hstu.data.events import EventLog, Outcomes

_HOUR_S, _DAY_S = 3600, 86_400


def derive_outcomes(
    log: EventLog,
    *,
    engagement_actions: Collection[str],
    engagement_dwell_s: float,
    purchase_actions: Collection[str],
    return_after_h: float,
    return_within_days: float,
) -> Outcomes:
    """int8 [T, 3] in the order of `hstu.config.TASKS`.

    engagement    the action is one of `engagement_actions`, or the dwell is known and at least the limit;
                  not known when the log has neither actions nor this event's dwell.
    retention     the user has an event later than `return_after_h` (so not of the same visit) and at most
                  `return_within_days` after this one; not known when there is none but the log ends before
                  that time is over.
    monetisation  the action is one of `purchase_actions` and the price is above 0 or not known; not known
                  for a log whose action set has none of `purchase_actions`.
    """
    columns = {
        "engagement": _engagement(log, engagement_actions, engagement_dwell_s),
        "retention": _retention(log, round(return_after_h * _HOUR_S), round(return_within_days * _DAY_S)),
        "monetisation": _monetisation(log, purchase_actions),
    }
    return np.stack([columns[task] for task in TASKS], axis=1).astype(np.int8)


def _is_one_of(log: EventLog, names: Collection[str]) -> npt.NDArray[np.bool_]:
    return np.array([False, *(name in names for name in log.action_names)])[log.actions]


def _engagement(log: EventLog, actions: Collection[str], dwell_s: float) -> npt.NDArray[np.int64]:
    known = ~np.isnan(log.dwell_s) | bool(log.action_names)
    engaged = _is_one_of(log, actions) | (np.nan_to_num(log.dwell_s, nan=-1.0) >= dwell_s)
    return np.where(known, engaged, -1)


def _retention(log: EventLog, after_s: int, within_s: int) -> npt.NDArray[np.int64]:
    """Users follow one another in the log, so one search over (user, time) finds every user's next visit."""
    span = int(log.timestamps.max(initial=0)) + within_s + after_s + 1  # keeps one user's times off the next one's
    key = log.users * span + log.timestamps
    upcoming = np.searchsorted(key, key + after_s, side="right")
    returned = np.searchsorted(key, key + within_s, side="right") > upcoming
    watched = log.timestamps + within_s <= log.timestamps.max(initial=0)
    return np.where(returned, 1, np.where(watched, 0, -1))


def _monetisation(log: EventLog, actions: Collection[str]) -> npt.NDArray[np.int64]:
    if not set(actions) & set(log.action_names):
        return np.full(len(log), -1, dtype=np.int64)
    return (_is_one_of(log, actions) & (np.isnan(log.price) | (log.price > 0))).astype(np.int64)
