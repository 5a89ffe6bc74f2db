"""What `check_feeds` lets through to the entry `extend`, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hstu.errors import InputError
from serving.engine import check_feeds
from stages.entry_check import check_batches, random_feeds
from tests.models import TINY

Feeds = dict[str, Any]


def test_valid_feeds_pass_with_anything_after_the_end_of_a_cache() -> None:
    for name in ("retrieve", "rank", "extend"):
        for feeds in check_batches(TINY, name, seed=3):  # type: ignore[arg-type]
            check_feeds(TINY, name, feeds)  # type: ignore[arg-type]
    feeds = random_feeds(TINY, "extend", [5, 9], seed=1)
    assert np.isnan(feeds["cache"]).any()


def cached(length: int) -> Feeds:
    """Feeds of two users, the second with some events cached."""
    feeds: Feeds = {}
    seed = 0
    while not feeds or feeds["cached_lengths"][1] < 2:
        feeds = dict(random_feeds(TINY, "extend", [3, length], seed=seed))
        seed += 1
    return feeds


def _set(name: str, index: Any, value: Any) -> Callable[[Feeds], None]:
    def change(feeds: Feeds) -> None:
        feeds[name] = feeds[name].copy()
        feeds[name][index] = value

    return change


def _replace(**values: Callable[[Feeds], Any]) -> Callable[[Feeds], None]:
    def change(feeds: Feeds) -> None:
        feeds.update({name: make(feeds) for name, make in values.items()})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("lengths", 0, 0), "lengths out of range"),
        (_set("lengths", 0, 99), "lengths out of range"),
        (_set("cached_lengths", 1, -1), "cached_lengths out of range"),
        (_set("cached_lengths", 1, 99), "cached_lengths out of range"),
        (_set("cache", (1, 1, 1, 3), np.nan), r"(?s)not a number.*rows \[1\]"),
        (_set("cache", (1, 0, 0, 0), -np.inf), "not a number"),
        (_set("item_ids", (1, 0), 0), "item_ids out of range"),
        (_set("item_ids", (1, 0), TINY.num_items + 1), "item_ids out of range"),
        (_set("actions", (0, 0), TINY.num_actions), "actions out of range"),
        (_set("timestamps", (1, 0), 5), "older than cached"),
        (_set("cached_timestamps", (1, 0), 2**60), "timestamps fall"),
        (_replace(cache=lambda f: f["cache"].astype(np.float64)), "wrong type"),
        (_replace(cache=lambda f: f["cache"][:, :1]), "wrong shape"),
        (_replace(cache=lambda f: f["cache"][..., :-1]), "wrong shape"),
        (_replace(cache=lambda f: f["cache"][:, :, :-1]), "wrong shape"),
        (_replace(cached_lengths=lambda f: f["cached_lengths"][:1]), "wrong shape"),
        (lambda f: f.pop("cached_timestamps"), "wrong inputs"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[Feeds], None], message: str) -> None:
    feeds = cached(12)
    check_feeds(TINY, "extend", feeds)
    change(feeds)
    with pytest.raises(InputError, match=message):
        check_feeds(TINY, "extend", feeds)


def test_cached_and_new_events_must_fit_together() -> None:
    feeds = cached(TINY.max_history)
    new = int(feeds["lengths"][1])
    more = {name: np.pad(feeds[name], ((0, 0), (0, 1)), mode="edge") for name in ("item_ids", "actions", "timestamps")}
    more["item_ids"][1, new], more["timestamps"][1, new] = 1, feeds["timestamps"][1, new - 1]
    feeds = feeds | more | {"lengths": feeds["lengths"] + np.array([0, 1])}
    with pytest.raises(InputError, match="together do not fit"):
        check_feeds(TINY, "extend", feeds)


def test_a_cache_without_positions_is_not_a_cache() -> None:
    feeds = random_feeds(TINY, "extend", [3])
    feeds["cache"], feeds["cached_timestamps"] = feeds["cache"][:, :, :0], feeds["cached_timestamps"][:, :0]
    with pytest.raises(InputError, match="this many positions"):
        check_feeds(TINY, "extend", feeds)


def test_large_numbers_are_numbers() -> None:
    feeds = cached(12)
    feeds["cache"] = np.where(np.isnan(feeds["cache"]), np.nan, np.float32(3e38)).astype(np.float32)
    check_feeds(TINY, "extend", feeds)


def test_a_cache_known_to_be_finite_is_not_read() -> None:
    feeds = cached(12)
    feeds["cache"] = np.full_like(feeds["cache"], np.nan)
    check_feeds(TINY, "extend", feeds, finite=True)
