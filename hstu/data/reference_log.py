"""A reference log drawn from a documented process, with structure that takes a long memory to predict.

World. Items fill a grid of clusters × styles; a cell of about ten items is a series with an order. Cluster
popularity falls as rank^-0.8, item popularity as 1/rank. Clusters stand on a ring, neighbours are related.
A cluster has a price level, an item a quality.

User. One style (skewed), four favourite clusters (half of the time the second is related to the first), a
place in every series, and three traits: enthusiasm, loyalty, budget. No id or column names them: they show
in the history alone, so they can be read off users who were never trained on.

Session. Two threads (clusters), A and B, are open. What the user does next depends on the last action and
on the gap before:
- within a session (minutes) a thread goes on after a like or a purchase (0.4), seldom after a click (0.06)
  and hardly after a view (0.02); else the other thread has its turn, where it was left some events ago;
- after an absence (hours) the user is back at thread A, the first favourite, and B is drawn anew from the
  four favourites (weights 0.5, 0.25, 0.15, 0.1); an absence of more than three days may (0.15) have turned
  the drawn one into the first favourite;
- now and then (0.08; 0.2 after an absence) the user repeats one of three items liked or bought before;
- now and then (0.03 to 0.1, most after a view) the user explores an item by global popularity. If that
  engages, its cluster becomes thread B and the last of the favourites: interests drift.

Series. Within a thread the cell of (cluster, own style; 0.05: any style) is walked: the next item (0.45), the
one after (0.15), or any of the cell, early ones first (density falling as the root of the place).

Outcomes are Bernoulli draws with these logits, appeal being 1.6 · style match + 0.8 · favourite cluster + quality:
- engagement ~ appeal + 0.8 enthusiasm - 1.7; it makes the dwell at least 30 s and the action click or like;
- monetisation ~ 0.6 appeal + 1.3 budget - 1.2 (log price - 3) - 1.8, given engagement; the action is purchase;
- retention ~ 1.4 loyalty + 0.6 appeal + 0.8 engagement - 1.3; the next absence is then about a day, else a week.

Everything is drawn from one seeded generator, one step of all users at a time. A first-order model sees the
thread of the last item only; which thread comes next, the style and the traits are matters of longer context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hstu.data.events import EventLog, Float64s, Outcomes
from hstu.data.histories import Int64s

ACTION_NAMES = ("view", "click", "like", "purchase")
VIEW, CLICK, LIKE, PURCHASE = 1, 2, 3, 4
ENGAGED_DWELL_S = 30
_MAX_EVENTS_PER_USER, _MIN_EVENTS_PER_USER = 160, 6
_STYLES, _CELL_ITEMS, _FAVOURITES, _DEAR = 5, 10, 4, 3
_FAVOURITE_WEIGHTS = np.array([0.5, 0.25, 0.15, 0.1])
_START = 1_735_689_600  # 2025-01-01
_DAY = 86_400
_SESSION_ENDS = 0.22
_LONG_ABSENCE_S = 3 * _DAY
_INTEREST_SHIFTS = 0.15
_CONTINUES = np.array([0.0, 0.02, 0.06, 0.4, 0.4])  # probability that the thread goes on, by last action
_EXPLORES = np.array([0.0, 0.1, 0.04, 0.03, 0.03])

Rng = np.random.Generator
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class _World:
    """Items 0..num_items-1 in grid order: `first[cell]` and `size[cell]` say which are in a cell."""

    num_clusters: int
    first: Int64s  # [clusters × styles]
    size: Int64s
    cell_of: Int64s  # [items]
    item_popularity: Float64s  # [items], sums to 1
    cluster_popularity: Float64s  # [clusters], sums to 1
    quality: Float64s  # [items]
    price: Float64s  # [items]


def reference_log(*, num_users: int, num_items: int, events_per_user: int, seed: int) -> tuple[EventLog, Outcomes]:
    """The log of `num_users` users over `num_items` items and its outcomes, the same for the same arguments."""
    rng = np.random.Generator(np.random.PCG64(seed))
    world = _draw_world(rng, num_items)
    num_events = np.clip(
        rng.gamma(2.5, (events_per_user - _MIN_EVENTS_PER_USER) / 2.5, num_users).astype(np.int64)
        + _MIN_EVENTS_PER_USER,
        _MIN_EVENTS_PER_USER,
        _MAX_EVENTS_PER_USER,
    )
    steps = _Simulation(rng, world, num_users).run(int(num_events.max()))
    happened = np.arange(len(steps.items))[:, None] < num_events
    users = np.broadcast_to(np.arange(num_users), happened.shape)

    def rows(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return values.swapaxes(0, 1)[happened.T]  # user by user, each oldest first

    names = np.char.add("item-", np.char.zfill(rng.permutation(num_items).astype("U"), 5))  # ids tell no cluster
    order = np.argsort(names)
    code_of = np.argsort(order)
    items = rows(steps.items)
    log = EventLog(
        users=rows(users).astype(np.int64),
        items=code_of[items].astype(np.int64),
        actions=rows(steps.actions).astype(np.int64),
        timestamps=rows(steps.timestamps).astype(np.int64),
        dwell_s=rows(steps.dwell_s).astype(np.float64),
        price=world.price[items],
        user_ids=tuple(f"user-{user:05d}" for user in range(num_users)),
        item_ids=tuple(names[order].tolist()),
        action_names=ACTION_NAMES,
    )
    return log, rows(steps.outcomes).astype(np.int8)


def _draw_world(rng: Rng, num_items: int) -> _World:
    num_clusters = max(_FAVOURITES, round(num_items / (_STYLES * _CELL_ITEMS)))
    edges = np.linspace(0, num_items, num_clusters * _STYLES + 1).astype(np.int64)
    first, size = edges[:-1], np.diff(edges)
    cell_of = np.repeat(np.arange(len(size)), size)
    cluster_of = cell_of // _STYLES
    cluster_popularity = _normalised(1.0 / (1 + rng.permutation(num_clusters)) ** 0.8)
    level = rng.normal(3.0, 0.8, num_clusters)
    return _World(
        num_clusters=num_clusters,
        first=first,
        size=size,
        cell_of=cell_of,
        item_popularity=_normalised(1.0 / (1 + rng.permutation(num_items))),
        cluster_popularity=cluster_popularity,
        quality=rng.normal(0.0, 1.0, num_items),
        price=np.round(np.exp(level[cluster_of] + rng.normal(0.0, 0.3, num_items)), 2),
    )


@dataclass(kw_only=True, slots=True)
class _Steps:
    """What every user did at every step: arrays [steps, users], outcomes [steps, users, 3]."""

    items: Int64s
    actions: Int64s
    timestamps: Int64s
    dwell_s: Int64s
    outcomes: Int64s


class _Simulation:
    """The state of all users; arrays are [users] unless said otherwise."""

    def __init__(self, rng: Rng, world: _World, num_users: int) -> None:
        self.rng, self.world, self.num_users = rng, world, num_users
        self.rows = np.arange(num_users)
        self.style = rng.choice(_STYLES, num_users, p=_normalised(1.0 / (1 + np.arange(_STYLES)) ** 0.5))
        self.enthusiasm, self.loyalty, self.budget = rng.normal(0.0, 1.0, (3, num_users))
        keys = np.log(world.cluster_popularity) + rng.gumbel(size=(num_users, world.num_clusters))
        self.favourites = np.argsort(-keys, axis=1)[:, :_FAVOURITES]  # drawn by popularity, no cluster twice
        related = (self.favourites[:, 0] + rng.choice([-1, 1], num_users)) % world.num_clusters
        self.favourites[:, 1] = np.where(rng.random(num_users) < 0.5, related, self.favourites[:, 1])
        self.progress = rng.geometric(0.25, (num_users, world.num_clusters)) - 2  # where the series was left
        self.thread_b = self.favourites[:, 1].copy()  # thread A is the first favourite
        self.current = self.favourites[:, 0].copy()
        self.dear = np.full((num_users, _DEAR), -1)  # the items last liked or bought, in turns
        self.action = np.full(num_users, VIEW)
        self.retained = np.ones(num_users, dtype=bool)
        self.time = _START + rng.integers(0, 60 * _DAY, num_users)
        self.dwell = np.zeros(num_users, dtype=np.int64)

    def run(self, num_steps: int) -> _Steps:
        items, actions, times, dwells, outcomes = [], [], [], [], []
        for step in range(num_steps):
            absence = self._advance_clock(first=step == 0)
            item = self._choose_item(absence)
            outcomes.append(self._react(item))
            items.append(item)
            actions.append(self.action.copy())
            times.append(self.time.copy())
            dwells.append(self.dwell.copy())
        return _Steps(
            items=np.stack(items),
            actions=np.stack(actions),
            timestamps=np.stack(times),
            dwell_s=np.stack(dwells),
            outcomes=np.stack(outcomes),
        )

    def _draw(self) -> Float64s:
        return self.rng.random(self.num_users)

    def _advance_clock(self, *, first: bool) -> Int64s:
        """Seconds of absence before this event, 0 within a session; the clock moves."""
        pause = self.dwell + self.rng.lognormal(4.0, 0.8, self.num_users)
        median_s = np.where(self.retained, 0.9 * _DAY, 7.0 * _DAY)
        absence = median_s * self.rng.lognormal(0.0, 0.4, self.num_users)
        away = (self._draw() < _SESSION_ENDS) | first
        if not first:
            self.time = self.time + 1 + np.where(away, absence, pause).astype(np.int64)
        return np.where(away, absence, 0).astype(np.int64)

    def _choose_item(self, absence: Int64s) -> Int64s:
        away, long = absence > 0, absence > _LONG_ABSENCE_S
        self._open_threads(away, long)
        thread_a = self.favourites[:, 0]
        other = np.where(self.current == thread_a, self.thread_b, thread_a)
        goes_on = self._draw() < _CONTINUES[self.action]
        self.current = np.where(away, thread_a, np.where(goes_on, self.current, other))
        item = self._walk_series()
        dear = self.dear[self.rows, self.rng.integers(0, _DEAR, self.num_users)]
        repeats = (self._draw() < np.where(away, 0.2, 0.08)) & (dear >= 0)
        explores = ~repeats & (self._draw() < np.where(away, 0.05, _EXPLORES[self.action]))
        item = np.where(repeats, dear, item)
        explored = self.rng.choice(len(self.world.cell_of), self.num_users, p=self.world.item_popularity)
        return np.where(explores, explored, item)

    def _open_threads(self, away: Bools, long: Bools) -> None:
        """After an absence thread B is one of the favourites; after a long one the first may be another."""
        pick = self.rng.choice(_FAVOURITES, self.num_users, p=_FAVOURITE_WEIGHTS)
        first, picked = self.favourites[:, 0].copy(), self.favourites[self.rows, pick]
        shifts = away & long & (self._draw() < _INTEREST_SHIFTS)
        self.favourites[self.rows, pick] = np.where(shifts, first, picked)
        self.favourites[:, 0] = np.where(shifts, picked, self.favourites[:, 0])
        fresh = np.where(shifts, first, picked)
        fresh = np.where(fresh == self.favourites[:, 0], self.favourites[:, 1], fresh)
        self.thread_b = np.where(away, fresh, self.thread_b)

    def _walk_series(self) -> Int64s:
        """The item at the next place of the current thread's series; places are kept per cluster."""
        stray = self.rng.integers(0, _STYLES, self.num_users)
        style = np.where(self._draw() < 0.05, stray, self.style)
        cell = self.current * _STYLES + style
        size = self.world.size[cell]
        place, how = self.progress[self.rows, self.current], self._draw()
        jump = (self._draw() ** 2 * size).astype(np.int64)
        place = np.where(how < 0.45, place + 1, np.where(how < 0.6, place + 2, jump)) % size
        return np.asarray(self.world.first[cell] + place, dtype=np.int64)

    def _react(self, item: Int64s) -> Int64s:
        """Outcomes int64 [users, 3] of seeing `item`; action, dwell, threads and interests follow."""
        world, rows = self.world, self.rows
        cell = world.cell_of[item]
        cluster, place = cell // _STYLES, item - world.first[cell]
        match = (cell % _STYLES == self.style).astype(np.float64)
        favourite = (self.favourites == cluster[:, None]).any(axis=1).astype(np.float64)
        appeal = 1.6 * match + 0.8 * favourite + world.quality[item]
        engaged = self._draw() < _sigmoid(appeal + 0.8 * self.enthusiasm - 1.7)
        paid_logit = 0.6 * appeal + 1.3 * self.budget - 1.2 * (np.log(world.price[item]) - 3.0) - 1.8
        paid = engaged & (self._draw() < _sigmoid(paid_logit))
        self.retained = self._draw() < _sigmoid(1.4 * self.loyalty + 0.6 * appeal + 0.8 * engaged - 1.3)
        warm = self._draw()
        self.action = np.where(engaged, np.where(warm < 0.6, LIKE, CLICK), np.where(warm < 0.25, CLICK, VIEW))
        self.action = np.where(paid, PURCHASE, self.action)
        seconds = self.rng.lognormal(4.0, 0.7, self.num_users).astype(np.int64)
        self.dwell = np.where(engaged, ENGAGED_DWELL_S + seconds, 1 + seconds % (ENGAGED_DWELL_S - 1))
        self.progress[rows, cluster] = place
        new = engaged & (favourite == 0)
        self.favourites[:, -1] = np.where(new, cluster, self.favourites[:, -1])
        self.thread_b = np.where(new, cluster, self.thread_b)
        self.current = np.where(new, cluster, self.current)
        liked = np.flatnonzero(self.action >= LIKE)
        self.dear[liked, self.rng.integers(0, _DEAR, len(liked))] = item[liked]
        return np.stack([engaged, self.retained, paid], axis=1).astype(np.int64)


def _sigmoid(x: npt.NDArray[np.floating]) -> Float64s:
    return np.asarray(1.0 / (1.0 + np.exp(-x)), dtype=np.float64)


def _normalised(weights: npt.NDArray[np.floating]) -> Float64s:
    return np.asarray(weights / weights.sum(), dtype=np.float64)
