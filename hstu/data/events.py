"""A log of user behaviour as every later step sees it: arrays of codes, sorted by user and then by time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hstu.data.histories import Int64s

Float64s = npt.NDArray[np.float64]
Outcomes = npt.NDArray[np.int8]  # [T, tasks], in the order of hstu.config.TASKS: 1, 0, -1 = not known


@dataclass(frozen=True, kw_only=True, slots=True)
class EventLog:
    """T events of one schema, sorted by (user, time); equal times keep the order of the file.

    users, items: int64 [T], codes into `user_ids` and `item_ids`, the raw ids as strings;
    actions: int64 [T], k stands for `action_names[k - 1]`, 0 = the log has no actions;
    timestamps: int64 [T], seconds since 1970, at least 1; dwell_s, price: float64 [T], NaN = not known.
    """

    users: Int64s
    items: Int64s
    actions: Int64s
    timestamps: Int64s
    dwell_s: Float64s
    price: Float64s
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    action_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.users)

    @property
    def offsets(self) -> Int64s:
        """int64 [users + 1]: user u's events are `[offsets[u], offsets[u + 1])`."""
        counts = np.bincount(self.users, minlength=len(self.user_ids))
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
