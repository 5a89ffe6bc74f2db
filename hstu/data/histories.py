"""User histories as the model sees them: model item ids, one jagged record of arrays on disk and in memory."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hstu.config import HSTUConfig
from hstu.errors import ArtifactError

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Histories:
    """B histories of T events in all, oldest first; row b is `[offsets[b], offsets[b + 1])`.

    item_ids, actions, timestamps: int64 [T]; offsets: int64 [B + 1]; query_time: int64 [B], 0 = not given;
    target_item: int64 [B], the item that came next, 0 = not known;
    target_outcomes: int8 [B, tasks], the target's outcomes, -1 = not known.
    """

    item_ids: Int64s
    actions: Int64s
    timestamps: Int64s
    offsets: Int64s
    query_time: Int64s
    target_item: Int64s
    target_outcomes: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64s:
        """int64 [B]."""
        return np.diff(self.offsets)

    def select(self, rows: Sequence[int] | Int64s) -> Histories:
        """The histories of `rows`, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        spans = [np.arange(self.offsets[r], self.offsets[r + 1]) for r in rows]
        events = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
        return Histories(
            item_ids=self.item_ids[events],
            actions=self.actions[events],
            timestamps=self.timestamps[events],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            query_time=self.query_time[rows],
            target_item=self.target_item[rows],
            target_outcomes=self.target_outcomes[rows],
        )

    def newest(self, num_events: int) -> Histories:
        """Every history cut to its newest `num_events` events."""
        lengths = np.minimum(self.lengths, num_events)
        spans = [np.arange(end - n, end) for end, n in zip(self.offsets[1:], lengths, strict=True)]
        events = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
        return Histories(
            item_ids=self.item_ids[events],
            actions=self.actions[events],
            timestamps=self.timestamps[events],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            query_time=self.query_time,
            target_item=self.target_item,
            target_outcomes=self.target_outcomes,
        )

    def feeds(self, config: HSTUConfig, *, length: int | None = None) -> dict[str, Int64s]:
        """The inputs of the retrieve entry (`hstu.signature`), 0-padded to `length` (default: the longest history).

        A query time that is not given becomes what the model's config says stands for it.
        """
        length = max(1, int(self.lengths.max(initial=0))) if length is None else length
        inside = np.arange(length) < self.lengths[:, None]

        def pad(values: Int64s) -> Int64s:
            padded = np.zeros((len(self), length), dtype=np.int64)
            padded[inside] = values
            return padded

        query_time = self.query_time
        if config.absent_query_time == "last_event":
            last = np.zeros(len(self), dtype=np.int64)
            some = self.lengths > 0
            last[some] = self.timestamps[self.offsets[1:][some] - 1]
            query_time = np.where(query_time == 0, last, query_time)
        feeds = {"item_ids": pad(self.item_ids)}
        if config.num_actions:
            feeds["actions"] = pad(self.actions)
        return feeds | {"timestamps": pad(self.timestamps), "lengths": self.lengths, "query_time": query_time}

    def save(self, path: Path) -> None:
        """Write an uncompressed npz whose bytes depend on the content alone (zip entries carry no clock)."""
        np.savez(path, **{name: getattr(self, name) for name in self.__slots__})  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Histories:
        """What `save` wrote; ArtifactError when it is not that."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in cls.__slots__})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{path}: not a histories file ({error})", fix="run its stage again") from None


def histories_from_rows(rows: Sequence[Mapping[str, Sequence[int]]], *, num_tasks: int = 0) -> Histories:
    """Histories from one mapping a user: item_ids, timestamps; optionally actions, query_time [1], target_item [1]."""

    def jagged(name: str) -> Int64s:
        parts = [np.asarray(r.get(name, np.zeros(len(r["item_ids"]))), dtype=np.int64) for r in rows]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def scalar(name: str) -> Int64s:
        return np.asarray([r[name][0] if r.get(name) is not None else 0 for r in rows], dtype=np.int64)

    return Histories(
        item_ids=jagged("item_ids"),
        actions=jagged("actions"),
        timestamps=jagged("timestamps"),
        offsets=np.concatenate([[0], np.cumsum([len(r["item_ids"]) for r in rows])]).astype(np.int64),
        query_time=scalar("query_time"),
        target_item=scalar("target_item"),
        target_outcomes=np.full((len(rows), num_tasks), -1, dtype=np.int8),
    )
