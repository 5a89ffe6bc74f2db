"""The eager model, which everything else is held against: what it computes, and what never changes its answer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.errors import InputError
from hstu.model import HSTU, History, history_from_feeds, l2_normalize
from hstu.time_buckets import time_buckets
from tests.models import TINY, TINY_RESEARCH, random_candidates, random_histories, random_model

CONFIGS = pytest.mark.parametrize("config", [TINY, TINY_RESEARCH], ids=["full", "research"])
EXACT = 2e-6  # of sums of fp32 in another order


def history_of(histories: Histories, config: HSTUConfig, *, length: int | None = None) -> History:
    feeds = histories.feeds(config, length=length)
    return history_from_feeds({name: torch.from_numpy(values) for name, values in feeds.items()})


def research_by_hand(model: HSTU, ids: list[int], times: list[int], query_time: int) -> Tensor:
    """The user embedding [D] of one history, event by event and head by head, from the formulas alone."""
    c = model.config
    x = torch.stack(
        [
            model.item_embedding.weight[item] * math.sqrt(c.embedding_dim) + model.position_embedding.weight[place]
            for place, item in enumerate(ids)
        ]
    )
    following = [*times[1:], query_time]

    def norm(row: Tensor) -> Tensor:
        return (row - row.mean()) / torch.sqrt(row.var(unbiased=False) + 1e-6)

    for layer in model.layers:
        projected = [torch.nn.functional.silu(layer.uvqk.weight @ norm(row)) for row in x]
        hv, hqk = c.num_heads * c.v_dim, c.num_heads * c.qk_dim
        rows = []
        for i, own in enumerate(projected):
            heads = []
            for head in range(c.num_heads):
                value = slice(hv + head * c.v_dim, hv + (head + 1) * c.v_dim)
                query = slice(2 * hv + head * c.qk_dim, 2 * hv + (head + 1) * c.qk_dim)
                key = slice(2 * hv + hqk + head * c.qk_dim, 2 * hv + hqk + (head + 1) * c.qk_dim)
                total = torch.zeros(c.v_dim)
                for j in range(i + 1):
                    bucket = int(time_buckets(torch.tensor(following[i] - times[j])))
                    score = own[query] @ projected[j][key]
                    score = score + layer.attention.position_bias[j - i + c.max_length - 1]
                    score = score + layer.attention.time_bias[bucket]
                    total = total + torch.nn.functional.silu(score) / c.max_length * projected[j][value]
                heads.append(total)
            gated = own[:hv] * norm(torch.cat(heads))
            rows.append(x[i] + layer.output.weight @ gated + layer.output.bias)
        x = torch.stack(rows)
    return x[-1] / x[-1].norm().clamp(min=1e-6)


def test_the_research_variant_is_the_formula() -> None:
    model = random_model(TINY_RESEARCH)
    ids, times, query = [3, 150, 7, 7, 41], [100, 100, 160, 90_000, 1_700_000_000], 1_700_000_060
    history = History(
        item_ids=torch.tensor([ids]),
        timestamps=torch.tensor([times]),
        lengths=torch.tensor([5]),
        query_time=torch.tensor([query]),
    )
    embedding, top, scores = model.retrieve(history)
    by_hand = research_by_hand(model, ids, times, query)
    assert (embedding[0] - by_hand).abs().max() <= EXACT
    cosine = l2_normalize(model.item_embedding.weight) @ by_hand
    cosine[0] = -2.0  # the padding item is never an answer
    assert (cosine[top[0]] - scores[0]).abs().max() <= EXACT
    assert (cosine.sort(descending=True).values[: top.shape[1]] - scores[0]).abs().max() <= EXACT


@CONFIGS
def test_jagged_equals_padded(config: HSTUConfig) -> None:
    model, histories = random_model(config), random_histories(config, num_users=9)
    history = history_of(histories, config)
    padded = model.encode(history)[torch.arange(history.item_ids.shape[1]) < history.lengths.unsqueeze(1)]
    jagged = model.encode_jagged(
        torch.from_numpy(histories.item_ids),
        torch.from_numpy(histories.timestamps),
        torch.from_numpy(histories.offsets),
        history.query_time,
        torch.from_numpy(histories.actions) if config.num_actions else None,
    )
    assert (jagged - padded).abs().max() <= EXACT
    with torch.no_grad():
        registry = model.encode_jagged(
            torch.from_numpy(histories.item_ids),
            torch.from_numpy(histories.timestamps),
            torch.from_numpy(histories.offsets),
            history.query_time,
            torch.from_numpy(histories.actions) if config.num_actions else None,
            kernels=config.qk_dim == config.v_dim,
        )
    assert (registry - padded).abs().max() <= 1e-5


@CONFIGS
def test_jagged_with_empty_histories(config: HSTUConfig) -> None:
    model = random_model(config)
    for lengths in ([], [0], [0, 3, 0, 1]):
        histories = random_histories(config, lengths=lengths)
        arguments = (histories.item_ids, histories.timestamps, histories.offsets, histories.query_time)
        states = model.encode_jagged(
            *(torch.from_numpy(a) for a in arguments),
            torch.from_numpy(histories.actions) if config.num_actions else None,
        )
        assert states.shape == (sum(lengths), config.embedding_dim)
        assert torch.isfinite(states).all()


@CONFIGS
@pytest.mark.parametrize("length", [1, 2, 7, 20])
def test_who_shares_the_batch_changes_nothing(config: HSTUConfig, length: int) -> None:
    model = random_model(config)
    histories = random_histories(config, lengths=[length, 20, 1, 13, length])
    embedding, _, scores = model.retrieve(history_of(histories, config))
    for row in range(len(histories)):
        alone, _, alone_scores = model.retrieve(history_of(histories.select([row]), config))
        assert (alone[0] - embedding[row]).abs().max() <= EXACT
        assert (alone_scores[0] - scores[row]).abs().max() <= EXACT


@CONFIGS
def test_what_stands_after_the_end_never_matters(config: HSTUConfig) -> None:
    """Random ids, actions and times after each history's end, and more columns: the same answer, bit for bit."""
    model, histories = random_model(config), random_histories(config, num_users=7)
    clean = history_of(histories, config, length=config.max_history)
    after = torch.arange(config.max_history) >= clean.lengths.unsqueeze(1)
    generator = torch.Generator().manual_seed(0)

    def poisoned(values: Tensor, high: int) -> Tensor:
        return torch.where(after, torch.randint(1, high, values.shape, generator=generator), values)

    dirty = replace(
        clean,
        item_ids=poisoned(clean.item_ids, config.num_items),
        timestamps=poisoned(clean.timestamps, 2**40),
        actions=None if clean.actions is None else poisoned(clean.actions, config.num_actions),
    )
    for one, other in zip(model.retrieve(clean), model.retrieve(dirty), strict=True):
        assert torch.equal(one, other)
    if config.tasks:
        candidates = torch.from_numpy(random_candidates(config, num_users=7, num_candidates=5))
        assert torch.equal(model.rank(clean, candidates), model.rank(dirty, candidates))
    shorter = history_of(histories.select([0]), config)
    assert shorter.item_ids.shape[1] < clean.item_ids.shape[1]
    assert (model.retrieve(shorter)[0][0] - model.retrieve(clean)[0][0]).abs().max() <= EXACT


def test_huge_projections_after_the_end_stay_outside() -> None:
    """What the layers before made of the rows after the end has no weight, however large it is."""
    model, lengths = random_model(), torch.tensor([4])
    attention = model.layers[0].attention
    uvqk = torch.randn(1, 9, TINY.uvqk_dim, generator=torch.Generator().manual_seed(0))
    buckets = torch.zeros(1, 9, 9, dtype=torch.long)
    clean = attention(uvqk[:, :4], buckets[:, :4, :4], lengths)
    uvqk[:, 4:] = 1e30
    assert (attention(uvqk, buckets, lengths)[:, :4] - clean).abs().max() <= EXACT


@CONFIGS
def test_lengths_none_one_and_all(config: HSTUConfig) -> None:
    model = random_model(config)
    histories = random_histories(config, lengths=[0, 1, config.max_history])
    embedding, top, scores = model.retrieve(history_of(histories, config))
    assert torch.isfinite(embedding).all()
    assert torch.isfinite(scores).all()
    assert top.min() >= 1
    assert top.max() <= config.num_items
    assert (embedding.norm(dim=1)[1:] - 1).abs().max() <= 1e-5
    # Nobody's history says nothing: every user without events gets the same answer, whenever asked.
    other = history_of(random_histories(config, lengths=[0, 5], seed=9), config)
    assert torch.equal(model.retrieve(other)[0][0], embedding[0])


@CONFIGS
def test_the_query_time_and_every_event_matter(config: HSTUConfig) -> None:
    model, histories = random_model(config), random_histories(config, lengths=[12])
    history = history_of(histories, config)
    embedding = model.retrieve(history)[0]
    assert not torch.equal(model.retrieve(replace(history, query_time=history.query_time + 500_000))[0], embedding)
    for event in range(12):
        changed = history.item_ids.clone()
        changed[0, event] = 1 + changed[0, event] % config.num_items
        assert not torch.equal(model.retrieve(replace(history, item_ids=changed))[0], embedding), event
        later = history.timestamps.clone()
        later[0, event:] += 5_000_000
        changed_times = replace(history, timestamps=later, query_time=history.query_time + 5_000_000)
        if event:
            assert not torch.equal(model.retrieve(changed_times)[0], embedding), event
    if config.num_actions:
        actions = (history.actions + 1) % config.num_actions  # type: ignore[operator]
        assert not torch.equal(model.retrieve(replace(history, actions=actions))[0], embedding)


def test_the_future_is_never_seen() -> None:
    model, histories = random_model(), random_histories(lengths=[20])
    history = history_of(histories, TINY)
    states = model.encode(history)
    changed = history.item_ids.clone()
    changed[0, 10:] = 5
    assert torch.equal(model.encode(replace(history, item_ids=changed))[0, :10], states[0, :10])


def test_candidates_do_not_see_one_another() -> None:
    model, histories = random_model(), random_histories(num_users=6)
    history = history_of(histories, TINY)
    candidates = torch.from_numpy(random_candidates(TINY, num_users=6, num_candidates=9))
    together = model.rank(history, candidates)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert (model.rank(history, candidates[:, order]) - together[:, order]).abs().max() <= EXACT
    for column in range(9):
        alone = model.rank(history, candidates[:, column : column + 1])
        assert (alone[:, 0] - together[:, column]).abs().max() <= EXACT
    same = model.rank(history, candidates[:, :1].expand(-1, 9))
    assert (same - same[:, :1]).abs().max() <= EXACT


@pytest.mark.parametrize("lengths", [[0, 1, 19], [5, 12, 18]])
def test_a_candidate_is_the_next_event_of_the_history(lengths: list[int]) -> None:
    """Its state is that of an event without action, appended at the query time and asked about at that time."""
    model, histories = random_model(), random_histories(lengths=lengths)
    feeds = histories.feeds(TINY)
    feeds["query_time"] = np.maximum(feeds["query_time"], feeds["timestamps"].max(axis=1)) + 77
    candidates = random_candidates(TINY, num_users=3, num_candidates=4)
    history = history_from_feeds({name: torch.from_numpy(values) for name, values in feeds.items()})
    scores = model.rank(history, torch.from_numpy(candidates))
    rows = np.arange(3)
    for column in range(4):
        appended = {n: np.pad(v, ((0, 0), (0, 1))) if v.ndim == 2 else v.copy() for n, v in feeds.items()}
        appended["item_ids"][rows, feeds["lengths"]] = candidates[:, column]
        appended["timestamps"][rows, feeds["lengths"]] = feeds["query_time"]
        appended["lengths"] = feeds["lengths"] + 1
        states = model.encode(history_from_feeds({n: torch.from_numpy(v) for n, v in appended.items()}))
        last = states[torch.arange(3), torch.from_numpy(feeds["lengths"])]
        assert (torch.sigmoid(model.task_heads(last)) - scores[:, column]).abs().max() <= EXACT


def test_ranking_inside_a_history_is_ranking_after_its_beginning() -> None:
    """In training a candidate stands where its event stood: the same as a history that ends before it."""
    model, histories = random_model(), random_histories(lengths=[16])
    history = history_of(histories, TINY)
    position = torch.tensor([[0, 1, 7, 15]])
    time = history.timestamps.gather(1, position)
    candidates = history.item_ids.gather(1, position)
    inside = model.rank_logits(history, candidates, position=position, time=time)
    for column, length in enumerate(position[0].tolist()):
        beginning = replace(history, lengths=torch.tensor([length]), query_time=time[:, column])
        alone = model.rank_logits(beginning, candidates[:, column : column + 1])
        assert (alone[0, 0] - inside[0, column]).abs().max() <= EXACT


def test_actions_are_required_where_the_model_was_trained_with_them() -> None:
    history = replace(history_of(random_histories(), TINY), actions=None)
    with pytest.raises(InputError, match="trained with actions"):
        random_model().retrieve(history)


def test_extending_a_cache_equals_the_whole_history() -> None:
    """`extend` on cached rows of a beginning gives what `retrieve` gives for all of it."""
    model, config = random_model(), TINY
    history = history_of(random_histories(lengths=[17, 9]), config)
    whole = model.retrieve(history)
    empty = torch.zeros(2, config.num_layers, 0, config.num_heads * (config.qk_dim + config.v_dim))
    no_times, none = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    cache = torch.nn.functional.pad(empty, (0, 0, 0, 1), value=float("nan"))  # a row that is not alive
    embedding, _, scores, rows = model.extend(history, cache, no_times, none)
    assert (embedding - whole[0]).abs().max() <= EXACT
    kept = 5
    new = History(
        item_ids=history.item_ids[:, kept:],
        timestamps=history.timestamps[:, kept:],
        lengths=history.lengths - kept,
        query_time=history.query_time,
        actions=history.actions[:, kept:],  # type: ignore[index]
    )
    again = model.extend(new, rows[:, :, :kept], history.timestamps[:, :kept], torch.full((2,), kept))
    assert (again[0] - whole[0]).abs().max() <= EXACT
    assert (again[2] - scores).abs().max() <= EXACT
