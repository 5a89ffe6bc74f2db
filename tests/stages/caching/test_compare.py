from __future__ import annotations

import numpy as np
import pytest

from hstu.errors import MissingBackendError, UsageError
from stages.caching import compare, traces
from stages.report_cache import cache


def short(trace: traces.Trace, requests: int) -> traces.Trace:
    return traces.Trace(time_s=trace.time_s[:requests], users=trace.users[:requests], nbytes=trace.nbytes[:requests])


@pytest.mark.parametrize("name", traces.TRACES)
def test_traces_are_in_order_of_time_and_the_same_every_time(name):
    first, second, other = (traces.TRACES[name](seed) for seed in (5, 5, 6))
    assert (np.diff(first.time_s) >= 0).all()
    assert np.array_equal(first.users, second.users)
    assert not np.array_equal(first.users[:1000], other.users[:1000])
    assert len(first.users) >= 100_000
    assert first.nbytes.min() > 0


def test_our_cache_misses_less_than_lru_on_a_skewed_trace():
    trace = short(traces.zipf(), 20_000)
    capacity = trace.footprint // 10
    ours = compare.our_hits(trace, capacity)[4000:].mean()
    cached: dict[int, int] = {}
    used = hits = 0
    for row, (user, nbytes) in enumerate(zip(trace.users.tolist(), trace.nbytes.tolist(), strict=True)):
        if user in cached:
            hits += row >= 4000
            cached[user] = cached.pop(user)
            continue
        cached[user] = nbytes
        used += nbytes
        while used > capacity:
            used -= cached.pop(next(iter(cached)))
    assert 1.0 - ours < 0.88 * (1.0 - hits / 16_000)


def test_the_next_request_of_a_user_is_found():
    assert compare._next_requests(np.array([5, 7, 5, 5, 7])).tolist() == [2, 4, 3, 2**62, 2**62]


def test_without_the_simulator_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingBackendError, match=r"locks/tools\.txt"):
        compare.compare(["zipf"], on_score=print)


def test_a_trace_that_is_not_known_is_named(monkeypatch):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="zipf"):
        compare.compare(["nope"], on_score=print)


def test_the_table_sets_ours_beside_lru_and_the_limit():
    scores = [
        {"trace": "zipf", "budget": 0.05, "policy": policy, "miss_ratio": miss, "byte_hit_ratio": 1 - miss}
        for policy, miss in (("lru", 0.5), (compare.OURS, 0.4), (compare.LIMIT, 0.3))
    ]
    header, rows = compare.table(scores)
    assert rows[0][-2:] == ["-20%", "0.100"]
    assert len(header) == len(rows[0])
    assert '<td class="number">-20%</td>' in cache(scores)
    assert cache(scores).count('<figure class="chart">') == len({score["trace"] for score in scores})
    assert cache([]) == ""
