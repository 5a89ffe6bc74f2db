"""Greedy slates by full recompute in eager PyTorch: the definition that vLLM's slates are held against.

A slate is a list of items for one moment. Each chosen item extends the history as an event with action 0
(none) at the query time, and the query time stays; so the first chosen item lies `query time - last event`
after the history and the others 0 after one another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hstu.errors import InputError
from hstu.model import HSTU, History


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


@torch.no_grad()
def greedy_slate(
    model: HSTU, history: History, num_items: int, *, exclude_history: bool = False, no_repeats: bool = True
) -> tuple[Tensor, Tensor]:
    """Item ids int64 [B, n] and cosine scores float32 [B, n]: at each step the best item still allowed.

    Raises InputError when the slate is longer than the model's positions allow, or when too few items are left.
    """
    config = model.config
    forbidden = torch.zeros(len(history.lengths), config.num_items, dtype=torch.bool, device=history.lengths.device)
    if exclude_history:
        forbidden |= history_mask(history, config.num_items)
    most_forbidden = int(forbidden.sum(1).max()) if len(forbidden) else 0
    check_slate(config.num_items, config.max_generated, num_items, most_forbidden, no_repeats=no_repeats)
    history = extend_history(history, num_items - 1)
    ids, scores = [], []
    for step in range(num_items):
        embedding = model.user_embedding(model.encode(history), history.lengths)
        best, column = model.item_scores(embedding).masked_fill(forbidden, -torch.inf).max(dim=1)
        ids.append(column + 1)
        scores.append(best)
        if no_repeats:
            forbidden = forbidden.scatter(1, column.unsqueeze(1), True)
        if step + 1 < num_items:
            history = append_items(history, column + 1)
    return torch.stack(ids, dim=1), torch.stack(scores, dim=1)
