"""Slates by full recompute in eager PyTorch: the definition that vLLM's slates are held against.

A slate is a list of items for one moment. Each chosen item extends the history as an event with action 0
(none) at the query time, and the query time stays; so the first chosen item lies `query time - last event`
after the history and the others 0 after one another.

    cosines  of the state with every item; an item that is not allowed has -inf, so every score is one after masking
    greedy   at each step the item of the highest cosine
    sample   the item of the highest cosine / temperature + Gumbel noise, which is a draw from the softmax
    beam     the `width` sequences of the highest Σ log softmax(cosines / temperature), best first
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hstu.config import HSTUConfig
from hstu.errors import InputError
from hstu.model import HSTU, History

Method = Literal["greedy", "sample", "beam"]
MAX_WIDTH = 256
MAX_BEAM_ITEMS = 4096  # width · items of one search: it occupies its process until it is done


@dataclass(frozen=True, kw_only=True, slots=True)
class Slate:
    """What is asked for. No item comes twice and only real items come unless it is said here."""

    num_items: int
    method: Method = "greedy"
    width: int = 32  # of a beam search
    temperature: float = 1.0  # of sampling and of a beam search's probabilities
    seed: int = 0  # of sampling: user b of a call draws with seed + b
    exclude_history: bool = False
    allow_repeats: bool = False
    deny_items: tuple[int, ...] = ()
    allow_items: tuple[int, ...] | None = None  # these alone

    def check(self, config: HSTUConfig, *, most_in_history: int = 0) -> None:
        """InputError when the model cannot make such a slate, or when too few items may be left."""
        if self.method not in ("greedy", "sample", "beam"):
            raise InputError("no such way to make a slate", got=self.method, expected="greedy, sample or beam")
        if not 0.001 <= self.temperature <= 1000.0:
            raise InputError("a slate's temperature is out of range", got=self.temperature, expected="0.001..1000")
        if not 0 <= self.seed < 2**62:
            raise InputError("a slate's seed is out of range", got=self.seed, expected="0..2^62 - 1")
        if self.method == "beam" and not (
            1 <= self.width <= MAX_WIDTH and self.width * self.num_items <= MAX_BEAM_ITEMS
        ):
            raise InputError(
                "the beam search is too wide", got=f"{self.width} beams of {self.num_items} items",
                expected=f"1..{MAX_WIDTH} beams, {MAX_BEAM_ITEMS} items in all",
            )  # fmt: skip
        listed = {*self.deny_items, *(self.allow_items or ())}
        if listed and not 1 <= min(listed) <= max(listed) <= config.num_items:
            wrong = min(listed) if min(listed) < 1 else max(listed)
            raise InputError("unknown item in a slate's lists", got=wrong, expected=f"1..{config.num_items}")
        allowed = config.num_items if self.allow_items is None else len(set(self.allow_items) - set(self.deny_items))
        denied = len(set(self.deny_items)) if self.allow_items is None else 0
        left = allowed - denied - (most_in_history if self.exclude_history else 0)
        check_slate(
            config.num_items, config.max_generated, self.num_items, config.num_items - left,
            no_repeats=not self.allow_repeats,
        )  # fmt: skip

    def forbidden(self, config: HSTUConfig, history_items: Tensor) -> Tensor:
        """bool [num_items]: column i is whether item i + 1 may not be chosen; history_items int64 [L]."""
        forbidden = torch.zeros(config.num_items, dtype=torch.bool, device=history_items.device)
        if self.allow_items is not None:
            forbidden[:] = True
            forbidden[torch.tensor(self.allow_items, dtype=torch.int64) - 1] = False
        if self.deny_items:
            forbidden[torch.tensor(self.deny_items, dtype=torch.int64) - 1] = True
        if self.exclude_history:
            forbidden[history_items - 1] = True
        return forbidden


@dataclass(frozen=True, kw_only=True, slots=True)
class Slates:
    """R slates a user, best first (R is 1 unless beams were asked for).

    item_ids int64 [B, R, n]; scores float32 [B, R, n], each item's cosine at its step; log_probabilities float32
    [B, R], None for greedy slates. A user of fewer legal beams than R has -inf and item 0 in the place of the others.
    """

    item_ids: Tensor
    scores: Tensor
    log_probabilities: Tensor | None


def stack_slates(users: list[Slates], width: int) -> Slates:
    """The slates of several users as one; a user of fewer than `width` gets -inf and item 0 for the others."""

    def stacked(parts: list[Tensor], fill: float) -> Tensor:
        rows = [F.pad(p, (0, 0) * (p.dim() - 2) + (0, width - p.shape[1]), value=fill) for p in parts]
        return torch.cat(rows)

    totals = [one.log_probabilities for one in users if one.log_probabilities is not None]
    return Slates(
        item_ids=stacked([one.item_ids for one in users], 0),
        scores=stacked([one.scores for one in users], -torch.inf),
        log_probabilities=stacked(totals, -torch.inf) if totals else None,
    )


def extend_history(history: History, num_items: int) -> History:
    """The history with room for `num_items` more events, those not yet there 0: [B, L] becomes [B, L + num_items]."""
    pad = (0, num_items)
    return History(
        item_ids=F.pad(history.item_ids, pad),
        timestamps=F.pad(history.timestamps, pad),
        lengths=history.lengths,
        query_time=history.query_time,
        actions=None if history.actions is None else F.pad(history.actions, pad),
    )


def append_items(history: History, item_ids: Tensor) -> History:
    """The history with one chosen item [B] more, at the query time, with action 0; there must be room for it."""
    where = history.lengths.unsqueeze(1)
    return History(
        item_ids=history.item_ids.scatter(1, where, item_ids.unsqueeze(1)),
        timestamps=history.timestamps.scatter(1, where, history.query_time.unsqueeze(1)),
        lengths=history.lengths + 1,
        query_time=history.query_time,
        actions=history.actions,
    )


def history_mask(history: History, num_items: int) -> Tensor:
    """bool [B, num_items]: column i is whether item i + 1 is in the history."""
    inside = torch.arange(history.item_ids.shape[1], device=history.lengths.device) < history.lengths.unsqueeze(1)
    seen = torch.zeros(len(history.lengths), num_items + 1, dtype=torch.bool, device=history.lengths.device)
    return seen.scatter(1, history.item_ids * inside, True)[:, 1:]


def check_slate(config_items: int, max_generated: int, num_items: int, num_forbidden: int, *, no_repeats: bool) -> None:
    """InputError when a slate of `num_items` cannot be made: too long, or too few items are allowed."""
    if not 1 <= num_items <= max_generated:
        raise InputError("the model cannot make a slate this long", got=num_items, expected=f"1..{max_generated}")
    allowed = config_items - num_forbidden
    if allowed < (num_items if no_repeats else 1):
        raise InputError(
            f"too few items are left for a slate of {num_items}",
            got=f"{allowed} allowed of {config_items}",
            fix="ask for a shorter slate, or exclude fewer items",
        )


def generator_of(seed: int) -> torch.Generator:
    """The noise of one sampled slate: the same numbers for the same seed, whoever else is asked for."""
    return torch.Generator().manual_seed(seed)


def gumbel_noise(num_items: int, generator: torch.Generator) -> Tensor:
    """float32 [num_items] on the CPU; the argmax of logits plus this is a draw from their softmax."""
    return -torch.empty(num_items, device="cpu").exponential_(generator=generator).log()


def make_slates(model: HSTU, history: History, slate: Slate) -> Slates:
    """The slates of a padded batch; raises InputError when one cannot be made."""
    config = model.config
    most = int(history_mask(history, config.num_items).sum(1).max()) if len(history.lengths) else 0
    slate.check(config, most_in_history=most)
    if slate.method == "beam":
        return _beams(model, history, slate)  # type: ignore[no-any-return]
    return _one_each(model, history, slate)  # type: ignore[no-any-return]


def greedy_slate(
    model: HSTU, history: History, num_items: int, *, exclude_history: bool = False, no_repeats: bool = True
) -> tuple[Tensor, Tensor]:
    """Item ids int64 [B, n] and cosine scores float32 [B, n]: at each step the best item still allowed.

    Raises InputError when the slate is longer than the model's positions allow, or when too few items are left.
    """
    slate = Slate(num_items=num_items, exclude_history=exclude_history, allow_repeats=not no_repeats)
    slates = make_slates(model, history, slate)
    return slates.item_ids[:, 0], slates.scores[:, 0]


@torch.no_grad()
def _one_each(model: HSTU, history: History, slate: Slate) -> Slates:
    """Greedy and sampled slates: one a user, all users at once."""
    config, users = model.config, len(history.lengths)
    forbidden = torch.zeros(users, config.num_items, dtype=torch.bool, device=history.lengths.device)
    for user in range(users):
        forbidden[user] = slate.forbidden(config, history.item_ids[user, : int(history.lengths[user])])
    generators = [generator_of(slate.seed + user) for user in range(users)]
    history = extend_history(history, slate.num_items - 1)
    ids, scores, total = [], [], torch.zeros(users)
    for step in range(slate.num_items):
        cosines = model.item_scores(model.user_embedding(model.encode(history), history.lengths))
        cosines = cosines.masked_fill(forbidden, -torch.inf)
        keys = cosines
        if slate.method == "sample":
            noise = torch.stack([gumbel_noise(config.num_items, g) for g in generators]) if users else cosines
            keys = cosines / slate.temperature + noise
        column = keys.argmax(dim=1)
        total += (cosines / slate.temperature).log_softmax(1).gather(1, column.unsqueeze(1)).squeeze(1)
        ids.append(column + 1)
        scores.append(cosines.gather(1, column.unsqueeze(1)).squeeze(1))
        if not slate.allow_repeats:
            forbidden = forbidden.scatter(1, column.unsqueeze(1), True)
        if step + 1 < slate.num_items:
            history = append_items(history, column + 1)
    return Slates(
        item_ids=torch.stack(ids, dim=1).unsqueeze(1),
        scores=torch.stack(scores, dim=1).unsqueeze(1),
        log_probabilities=total.unsqueeze(1) if slate.method == "sample" else None,
    )


@torch.no_grad()
def _beams(model: HSTU, history: History, slate: Slate) -> Slates:
    """Beam search, one user after the other, every beam a history of its own."""
    users, width, num_items = len(history.lengths), slate.width, slate.num_items
    ids = torch.zeros(users, width, num_items, dtype=torch.int64)
    scores = torch.full((users, width, num_items), -torch.inf)
    totals = torch.full((users, width), -torch.inf)
    for user in range(users):
        one = extend_history(_row(history, torch.tensor([user])), num_items)
        forbidden = slate.forbidden(model.config, one.item_ids[0, : int(one.lengths[0])])
        best, chosen, got = torch.zeros(1), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0)
        for _ in range(num_items):
            cosines = model.item_scores(model.user_embedding(model.encode(one), one.lengths))
            cosines = cosines.masked_fill(forbidden, -torch.inf)
            if not slate.allow_repeats:
                cosines = cosines.scatter(1, chosen - 1, -torch.inf)
            keys = (
                ((cosines / slate.temperature).log_softmax(1) + best.unsqueeze(1))
                .nan_to_num(nan=-torch.inf, neginf=-torch.inf)
                .flatten()
            )
            best, flat = keys.topk(min(width, int(keys.isfinite().sum())))
            parents, columns = flat // model.config.num_items, flat % model.config.num_items
            chosen = torch.cat([chosen[parents], (columns + 1).unsqueeze(1)], 1)
            got = torch.cat([got[parents], cosines[parents, columns].unsqueeze(1)], 1)
            one = append_items(_row(one, parents), columns + 1)
        ids[user, : len(best)], scores[user, : len(best)], totals[user, : len(best)] = chosen, got, best
    return Slates(item_ids=ids, scores=scores, log_probabilities=totals)


def _row(history: History, rows: Tensor) -> History:
    """The users `rows` int64 [n] of a batch, as often as they are named."""
    return replace(
        history,
        item_ids=history.item_ids[rows],
        timestamps=history.timestamps[rows],
        lengths=history.lengths[rows],
        query_time=history.query_time[rows],
        actions=None if history.actions is None else history.actions[rows],
    )
