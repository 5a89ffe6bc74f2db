from __future__ import annotations

import numpy as np
import pytest

from hstu.errors import ParameterError
from serving.cache import Codec, HotCache
from serving.heat import DAY_S, Heat

SIZES: Codec[bytes] = Codec(nbytes=len, packed_nbytes=len, pack=bytes, unpack=bytes)


def new_cache(memory: int, *, device: int | None = None, **options) -> HotCache:
    return HotCache({"user": SIZES}, memory_bytes=memory, device_bytes=device, **options)


def visit(cache: HotCache, key: str, now: float, *, nbytes: int = 10, cost_s: float = 1.0) -> bool:
    found = cache.get("user", key, now)
    if found is None:
        cache.put("user", key, key.encode().ljust(nbytes), cost_s=cost_s, now=now)
    return found is not None


def test_a_value_comes_back_as_it_was_from_every_tier(tmp_path):
    cache = new_cache(200, device=100, disk=tmp_path / "spill", disk_bytes=1000)
    for index in range(100):
        visit(cache, f"u{index}", float(index))
    assert all(used for used in cache.bytes_used().values())
    tiers = set()
    for index in range(100):
        value = cache.get("user", f"u{index}", 200.0 + index)
        if value is not None:
            assert value.strip() == f"u{index}".encode()
    tiers = {tier for (_, tier) in cache.stats.hits}
    assert tiers == {"device", "host", "disk"}
    files = list((tmp_path / "spill").iterdir())
    assert len(files) == cache.num_entries()["disk"]


def test_no_tier_ever_holds_more_than_its_limit(tmp_path):
    rng = np.random.default_rng(0)
    cache = new_cache(1000, device=400, disk=tmp_path, disk_bytes=700)
    limits = {"device": 400, "host": 600, "disk": 700}
    for step in range(3000):
        visit(cache, f"u{rng.zipf(1.3) % 200}", step * 0.1, nbytes=int(rng.integers(1, 120)))
        assert all(cache.bytes_used()[name] <= limit for name, limit in limits.items())
    disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert disk == cache.bytes_used()["disk"]


def test_what_costs_more_to_compute_again_stays():
    cache = new_cache(500, device=500)
    rng = np.random.default_rng(1)
    hits = {"dear": 0, "cheap": 0}
    for step in range(6000):
        kind = "dear" if rng.random() < 0.5 else "cheap"
        hits[kind] += visit(cache, f"{kind}{rng.integers(60)}", float(step), cost_s=50.0 if kind == "dear" else 1.0)
    assert hits["dear"] > 2 * hits["cheap"]


def test_a_scan_does_not_empty_the_cache():
    rng = np.random.default_rng(2)
    cache, fresh, hits = new_cache(400, device=400), 1000, 0
    for step in range(8000):
        if (step // 500) % 2 and step % 4:
            fresh += 1
            visit(cache, f"scan{fresh}", step * 0.1)
        elif visit(cache, f"u{rng.integers(40)}", step * 0.1) and step > 4000:
            hits += 1
    assert hits > 0.9 * (4000 * 5 // 8)


def test_dropped_and_cleared_values_are_gone():
    cache = new_cache(100)
    visit(cache, "a", 0.0)
    assert cache.drop("user", "a")
    assert not cache.drop("user", "a")
    assert not cache.drop("user", "never seen")
    visit(cache, "b", 1.0)
    cache.clear()
    assert cache.get("user", "b", 2.0) is None
    assert sum(cache.bytes_used().values()) == 0


def test_users_expected_back_are_moved_up():
    cache = new_cache(2000, device=200)
    for step in range(3000):
        visit(cache, f"u{step % 60}", step * 1.0)
    for index in range(0, 60, 2):  # half of them leave, so there is room
        cache.drop("user", f"u{index}")
    assert cache.bytes_used()["device"] < 200
    left = cache.num_entries()["host"]
    moved = cache.prefetch(3010.0, at_least=0.3)
    assert 0 < moved == cache.stats.prefetched <= left
    assert cache.num_entries()["host"] == left - moved
    for index in range(60):
        visit(cache, f"u{index}", 3011.0 + index)
    assert cache.stats.prefetched_used == moved


def test_a_device_tier_larger_than_the_budget_is_refused():
    with pytest.raises(ParameterError, match="larger than the budget"):
        new_cache(10, device=11)


def test_predictions_tell_regular_users_from_passers_by():
    heat = Heat(capacity=4096, horizon_s=100.0)
    rng = np.random.default_rng(3)
    for step in range(4000):
        key = f"regular{step // 2 % 20}" if step % 2 else f"once{step}"
        heat.watch(heat.seen(key, step * 1.0), step * 1.0)
        if rng.random() < 0.2:
            heat.watch(heat.seen("regular0", step * 1.0), step * 1.0)
    slots = [heat.seen("regular3", 4001.0), heat.seen("once-new", 4001.0)]
    regular, passer_by = heat.predict(np.array(slots), 4002.0)
    assert regular > 0.8
    assert passer_by < 0.3
    assert heat.accuracy.share_right > 0.8
    assert 0.0 <= heat.accuracy.brier < 0.2


def test_predictions_learn_the_hour_of_the_day():
    heat = Heat(capacity=64, horizon_s=3600.0)
    for day in range(60):
        for hour in range(24):
            now = day * DAY_S + hour * 3600.0
            for user, its_hour in (("morning", 8), ("evening", 20)):
                slot = heat.slot(user)
                if slot is not None:
                    heat.watch(slot, now)
                if hour == its_hour:
                    heat.seen(user, now + 600.0)
    now = 60 * DAY_S + 8 * 3600.0
    slots = np.array([heat.slot("morning"), heat.slot("evening")])
    morning, evening = heat.predict(slots, now)
    assert morning > evening


def test_a_full_table_forgets_the_oldest_that_nobody_holds():
    heat = Heat(capacity=128)
    held = heat.seen("held", 0.0)
    heat.hold(held, True)
    for step in range(1000):
        heat.seen(f"k{step}", 1.0 + step)
    assert len(heat) == 128
    assert heat.slot("held") == held
    assert heat.slot("k999") is not None
    assert heat.slot("k0") is None


def test_lessons_that_are_learned_take_no_room():
    heat = Heat(capacity=256, horizon_s=1e6)
    for step in range(20_000):
        heat.watch(heat.seen(f"u{step % 50}", float(step)), float(step))
    assert len(heat._queue) <= 2 * 50 + 1025
    assert heat.accuracy.predictions == 20_000 - 50
