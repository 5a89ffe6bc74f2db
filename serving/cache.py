"""What is hot stays near: users' states and item embeddings under one memory budget, in tiers.

    device   values as the runtime reads them, ready to use
    host     the same values packed into bytes: no spare room, no objects; same bits when unpacked
    disk     the packed bytes in files (only where a folder is given)

Every entry has a size in bytes and a cost: the seconds it takes to compute it again. Its worth is

    P(asked for again within the horizon) · cost / size            (`serving.heat` predicts the first factor)

and room is made by letting go of what is worth least of some entries drawn at random, unless the newcomer is worth
less still: then it is not taken in. What leaves a tier moves to the next, on the same terms. The horizon is the
time in which the budget fills anew, so it follows the load. Values are never changed once they are in the cache.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from hstu.errors import ParameterError
from serving.heat import Heat

TierName = Literal["device", "host", "disk"]
T = TypeVar("T")
_DRAWN = 32  # entries looked at to find room
_SHARE_OF_TURNOVER = 4  # the horizon is measured again when a quarter of the budget has been missed
_LEARN_SHARE = 0.5  # of requests after which an entry at rest is watched too


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec(Generic[T]):
    """How one kind of value is measured and packed; both sizes are upper bounds, records and headers included."""

    nbytes: Callable[[T], int]
    packed_nbytes: Callable[[T], int]
    pack: Callable[[T], bytes]
    unpack: Callable[[bytes], T]


@dataclass(kw_only=True, slots=True)
class _Entry:
    kind: str
    slot: int
    cost_s: float
    nbytes: int  # in the tier it is in
    held: Any  # the value, its bytes, or its path
    prefetched: bool = False


@dataclass(kw_only=True, slots=True)
class _Tier:
    name: TierName
    limit: int
    used: int = 0
    entries: dict[int, _Entry] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)  # slots, to draw from
    place: dict[int, int] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class CacheStats:
    """Counts since the start: `hits` by (kind, tier), `misses` by kind, bytes of both, entries gone by (tier, why)."""

    hits: Counter[tuple[str, str]] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    hit_bytes: int = 0
    missed_bytes: int = 0
    gone: Counter[tuple[str, str]] = field(default_factory=Counter)  # evicted, moved, refused, dropped
    prefetched: int = 0
    prefetched_used: int = 0

    @property
    def hit_rate(self) -> float:
        total = self.hits.total() + self.misses.total()
        return self.hits.total() / total if total else math.nan


class HotCache:
    """Values by (kind, key), within the budget at any moment. Safe to use from many threads."""

    def __init__(
        self,
        codecs: Mapping[str, Codec[Any]],
        *,
        memory_bytes: int,
        device_bytes: int | None = None,
        disk: Path | None = None,
        disk_bytes: int = 0,
        tracked_keys: int = 1 << 17,
        seed: int = 0,
    ) -> None:
        """`memory_bytes` is for device and host tier together; the device tier takes `device_bytes` (default: half)."""
        device_bytes = memory_bytes // 2 if device_bytes is None else device_bytes
        if not 0 <= device_bytes <= memory_bytes:
            raise ParameterError("cache: the device tier is larger than the budget", got=device_bytes,
                                 expected=f"0..{memory_bytes} bytes")  # fmt: skip
        self.heat = Heat(capacity=tracked_keys, seed=seed)
        self.stats = CacheStats()
        self._codecs = codecs
        self._tiers = [_Tier(name="device", limit=device_bytes), _Tier(name="host", limit=memory_bytes - device_bytes)]
        self._disk = disk
        if disk is not None:
            disk.mkdir(parents=True, exist_ok=True)
            for stale in disk.glob("*.state"):
                stale.unlink()
            self._tiers.append(_Tier(name="disk", limit=disk_bytes))
        self._budget = sum(tier.limit for tier in self._tiers)
        self._random = np.random.default_rng(seed)
        self._lock = threading.RLock()
        self._turn_start: float | None = None
        self._turn_bytes = 0

    def get(self, kind: str, key: str, now: float) -> Any | None:
        """The value, now in the device tier if it is worth it; None when it is not here."""
        with self._lock:
            slot = self.heat.seen(f"{kind}:{key}", now)
            tier = self._tier_of(slot)
            self._watch(slot, now)
            if tier is None:
                self.stats.misses[kind] += 1
                return None
            entry = tier.entries[slot]
            self.stats.hits[kind, tier.name] += 1
            self.stats.hit_bytes += entry.nbytes
            self.stats.prefetched_used += entry.prefetched
            entry.prefetched = False
            value = self._value(entry, tier)
            if tier.name != "device":
                self._move_up(entry, value, tier, now)
            return value

    def put(self, kind: str, key: str, value: Any, *, cost_s: float, now: float, missed: bool = True) -> bool:
        """Whether the value is kept, in whatever tier. It replaces what was there; `missed`: it had to be computed."""
        with self._lock:
            slot = self.heat.slot(f"{kind}:{key}")
            if slot is None:
                slot = self.heat.seen(f"{kind}:{key}", now)
            nbytes = self._nbytes(kind, value, self._tiers[0])
            if missed:
                self.stats.missed_bytes += nbytes
                self._measure_turnover(nbytes, now)
            tier = self._tier_of(slot)
            if tier is not None:
                self._discard(self._take(tier.entries[slot], tier), tier)
            entry = _Entry(kind=kind, slot=slot, cost_s=cost_s, nbytes=nbytes, held=value)
            kept = self._place(entry, value, 0, now)
            if not kept:
                self.stats.gone["device", "refused"] += 1
            return kept

    def drop(self, kind: str, key: str) -> bool:
        """Nothing of this key is here any more; whether there was."""
        with self._lock:
            slot = self.heat.slot(f"{kind}:{key}")
            tier = None if slot is None else self._tier_of(slot)
            if slot is None or tier is None:
                return False
            self._discard(self._take(tier.entries[slot], tier), tier)
            self.stats.gone[tier.name, "dropped"] += 1
            return True

    def clear(self) -> None:
        """Nothing is here any more: what was computed belongs to another bundle."""
        with self._lock:
            for tier in self._tiers:
                for slot in list(tier.order):
                    self._discard(self._take(tier.entries[slot], tier), tier)
                    self.stats.gone[tier.name, "dropped"] += 1

    def prefetch(self, now: float, *, most: int = 16, at_least: float = 0.5) -> int:
        """How many of the lower tiers' entries, expected back within the horizon, now stand in the device tier."""
        moved = 0
        with self._lock:
            for tier in self._tiers[1:]:
                drawn = [tier.order[i] for i in self._draw(tier, 8 * most)]
                for _, slot in self.heat.likely(now, drawn, at_least=at_least)[: most - moved]:
                    entry = tier.entries[slot]
                    if self._victims(self._tiers[0], entry.nbytes, self._worth(entry, now), now) is None:
                        continue
                    self._move_up(entry, self._value(entry, tier), tier, now)
                    entry.prefetched = entry.slot in self._tiers[0].entries
                    moved += entry.prefetched
            self.stats.prefetched += moved
        return moved

    def bytes_used(self) -> dict[str, int]:
        """Bytes in use by tier."""
        return {tier.name: tier.used for tier in self._tiers}

    def num_entries(self) -> dict[str, int]:
        """Entries by tier."""
        return {tier.name: len(tier.entries) for tier in self._tiers}

    def _tier_of(self, slot: int) -> _Tier | None:
        return next((tier for tier in self._tiers if slot in tier.entries), None)

    def _draw(self, tier: _Tier, most: int) -> list[int]:
        """Places in the tier's order, distinct."""
        count = len(tier.order)
        if count <= most:
            return list(range(count))
        return sorted(set(self._random.integers(0, count, most).tolist()))

    def _worth(self, entry: _Entry, now: float) -> float:
        """Seconds of computing saved per byte."""
        return float(self.heat.predict(np.array([entry.slot]), now)[0]) * entry.cost_s / max(entry.nbytes, 1)

    def _victims(self, tier: _Tier, nbytes: int, worth: float, now: float) -> list[_Entry] | None:
        """What leaves the tier for `nbytes` worth this much; None when what is there is worth more."""
        free = tier.limit - tier.used
        if nbytes > tier.limit:
            return None
        found: list[_Entry] = []
        if free >= nbytes:
            return found
        drawn = [tier.entries[tier.order[i]] for i in self._draw(tier, _DRAWN)]
        probability = self.heat.predict(np.array([entry.slot for entry in drawn], np.int64), now)
        worths = probability * np.array([entry.cost_s / max(entry.nbytes, 1) for entry in drawn])
        for index in np.argsort(worths, kind="stable").tolist():
            if free >= nbytes:
                break
            if worths[index] >= worth:
                return None
            found.append(drawn[index])
            free += drawn[index].nbytes
        return found if free >= nbytes else None

    def _place(self, entry: _Entry, value: Any, first: int, now: float) -> bool:
        """Whether the entry stands in a tier from `first` on; what it pushes out moves on in its turn."""
        for index in range(first, len(self._tiers)):
            tier = self._tiers[index]
            entry.nbytes = self._nbytes(entry.kind, value, tier)
            victims = self._victims(tier, entry.nbytes, self._worth(entry, now), now)
            if victims is None:
                continue
            moving = [(victim, self._value(victim, tier)) for victim in victims]
            for victim in victims:
                self._discard(self._take(victim, tier), tier)
            self._add(entry, value, tier)
            for victim, victim_value in moving:
                kept = self._place(victim, victim_value, index + 1, now)
                self.stats.gone[tier.name, "moved" if kept else "evicted"] += 1
            return True
        return False

    def _nbytes(self, kind: str, value: Any, tier: _Tier) -> int:
        codec = self._codecs[kind]
        return codec.nbytes(value) if tier.name == "device" else codec.packed_nbytes(value)

    def _move_up(self, entry: _Entry, value: Any, tier: _Tier, now: float) -> None:
        """The entry stands in the highest tier that has room for it, which may be the one it was in."""
        self._discard(self._take(entry, tier), tier)
        if not self._place(entry, value, 0, now):
            self.stats.gone[tier.name, "evicted"] += 1

    def _value(self, entry: _Entry, tier: _Tier) -> Any:
        if tier.name == "device":
            return entry.held
        data = entry.held.read_bytes() if tier.name == "disk" else entry.held
        return self._codecs[entry.kind].unpack(data)

    def _add(self, entry: _Entry, value: Any, tier: _Tier) -> None:
        if tier.name == "device":
            entry.held = value
        else:
            entry.held = self._codecs[entry.kind].pack(value)
            if tier.name == "disk" and self._disk is not None:
                path = self._disk / f"{hashlib.sha256(self.heat.key(entry.slot).encode()).hexdigest()}.state"
                path.write_bytes(entry.held)
                entry.held = path
        tier.entries[entry.slot] = entry
        tier.place[entry.slot] = len(tier.order)
        tier.order.append(entry.slot)
        tier.used += entry.nbytes
        self.heat.hold(entry.slot, True)

    def _take(self, entry: _Entry, tier: _Tier) -> _Entry:
        """The entry, no longer in the tier."""
        del tier.entries[entry.slot]
        place, last = tier.place.pop(entry.slot), tier.order.pop()
        if last != entry.slot:
            tier.order[place] = last
            tier.place[last] = place
        tier.used -= entry.nbytes
        self.heat.hold(entry.slot, False)
        return entry

    def _discard(self, entry: _Entry, tier: _Tier) -> None:
        if tier.name == "disk":
            entry.held.unlink(missing_ok=True)

    def _watch(self, slot: int, now: float) -> None:
        """Predictions are made of keys as they are asked for and of entries at rest, which is when they are used."""
        self.heat.watch(slot, now)
        if self._random.random() < _LEARN_SHARE:
            for tier in self._tiers:
                if tier.order:
                    self.heat.watch(tier.order[int(self._random.integers(len(tier.order)))], now)

    def _measure_turnover(self, nbytes: int, now: float) -> None:
        """The horizon becomes what it takes to miss as many bytes as the budget holds."""
        if self._turn_start is None:
            self._turn_start = now
        self._turn_bytes += nbytes
        if self._turn_bytes * _SHARE_OF_TURNOVER > self._budget:
            found = max((now - self._turn_start) * self._budget / self._turn_bytes, 1.0)
            self.heat.horizon_s = math.exp(0.7 * math.log(self.heat.horizon_s) + 0.3 * math.log(found))
            self._turn_start, self._turn_bytes = now, 0
