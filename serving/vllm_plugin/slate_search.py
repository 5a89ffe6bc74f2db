"""Sampled, greedy and beam slates inside the model's process, over the pages that a prefill left.

After a request's prefill its events are in the pages. The search then runs to its end at once: beams share these
events and see their own suffix through an index of ancestors, so nothing is copied when beams change places. The
head goes block by block over the items; only blocks that may hold one of the best are looked into again. The
engine's other requests wait meanwhile, which is why `serving.slate.MAX_BEAM_ITEMS` bounds a search.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hstu.config import HSTUConfig
from hstu.model import l2_normalize
from hstu.time_buckets import time_buckets
from serving.slate import Slate, Slates, generator_of, gumbel_noise
from serving.vllm_plugin.attention import HSTUMetadata
from serving.vllm_plugin.kernel import BeamPlan

HEAD_COLUMNS = 4096  # items scored at once, so that their cosines stay in the cache
GROUP = 64  # items that share a maximum when the best are looked for


class PagedModel(Protocol):
    """What the search needs of `serving.vllm_plugin.model.HSTUForCausalLM`."""

    config: HSTUConfig
    dtype: torch.dtype
    layers: Any
    item_embedding: torch.nn.Embedding
    inverse_norms: Tensor

    def embed_chosen(self, item_ids: Tensor, position: int, gaps: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """A request's events in the pages: its row in the step, how many, when the last was, and the query time."""

    step: HSTUMetadata
    request: int
    length: int
    query_time: int
    times: Tensor  # int64 [length]


class BeamAttention:
    """Attention of a beam step of one request, layer by layer: by the kernel, else in PyTorch."""

    def __init__(self, model: PagedModel, prefix: Prefix, width: int, num_steps: int) -> None:
        config, self.prefix = model.config, prefix
        first = model.layers[0].attention
        self.value_dim, self.key_dim = first.value_dim, first.key_dim
        shape = (num_steps * width, first.num_heads, config.qk_dim + config.v_dim)
        self.suffixes = [torch.empty(shape, dtype=model.dtype) for _ in model.layers]
        self.buckets = time_buckets(prefix.query_time - prefix.times)
        self.plan: BeamPlan | None = None
        if prefix.step.kernel is not None:
            self.plan = BeamPlan(prefix.step.kernel, prefix.request, self.buckets)

    def __call__(self, index: int, layer: Any, uvqk: Tensor, ancestors: Tensor) -> Tensor:
        """Gated output [W, H·dv] of beams [W, uvqk] whose suffix rows, own last, are ancestors int64 [W, s]."""
        attention, suffix = layer.attention, self.suffixes[index]
        if self.plan is not None:
            return self.plan.attend(uvqk, attention.paged.kv_cache, attention, suffix, ancestors)
        config, heads = attention.config, (attention.num_heads, -1)
        u, v, q, k = F.silu(uvqk).split([self.value_dim, self.value_dim, self.key_dim, self.key_dim], dim=-1)
        suffix[ancestors[:, -1]] = torch.cat([k.unflatten(1, heads), v.unflatten(1, heads)], -1)
        rows = self._prefix_rows(attention.paged.kv_cache)  # [H, L, dqk + dv]
        length, num_suffix = rows.shape[1], ancestors.shape[1]
        queries = q.unflatten(1, heads)
        near = torch.arange(length) - (length + num_suffix - 1) + config.max_length - 1
        bias = attention.position_bias[near] + attention.time_bias[self.buckets]
        scores = queries.transpose(0, 1) @ rows[..., : config.qk_dim].transpose(1, 2)
        weights = F.silu(scores.float() + bias).to(rows.dtype)
        attended = (weights @ rows[..., config.qk_dim :]).transpose(0, 1).float()
        own = suffix[ancestors]  # [W, s, H, dqk + dv]
        near = torch.arange(num_suffix) - num_suffix + config.max_length
        bias = attention.position_bias[near] + attention.time_bias[0]
        weights = F.silu((queries.unsqueeze(1) * own[..., : config.qk_dim]).float().sum(-1) + bias.unsqueeze(1))
        attended = attended + (weights.unsqueeze(-1) * own[..., config.qk_dim :].float()).sum(1)
        return u * attention.norm((attended / config.max_length).flatten(1)).to(u.dtype)

    def _prefix_rows(self, pages: Tensor) -> Tensor:
        block, prefix = self.prefix.step.block_size, self.prefix
        table = prefix.step.table[prefix.request, : -(-prefix.length // block)].long()
        return pages[table].transpose(0, 1).flatten(1, 2)[:, : prefix.length]


def search(model: PagedModel, state: Tensor, prefix: Prefix, slate: Slate, history_items: Sequence[int]) -> Slates:
    """The slates of one request as `serving.slate` defines them, B = 1; state [D] is the one after its last event."""
    # what is made on the way is made where the state is; on a CPU that is so anyhow, and the mode costs every call
    with torch.inference_mode(), nullcontext() if state.device.type == "cpu" else state.device:
        return _search(model, state, prefix, slate, history_items)


def _search(model: PagedModel, state: Tensor, prefix: Prefix, slate: Slate, history_items: Sequence[int]) -> Slates:
    config, num_items = model.config, slate.num_items
    width = slate.width if slate.method == "beam" else 1
    forbidden = slate.forbidden(config, torch.tensor(history_items, dtype=torch.int64))
    masked = torch.zeros(config.num_items).masked_fill_(forbidden, -torch.inf) if bool(forbidden.any()) else None
    noise = generator_of(slate.seed) if slate.method == "sample" else None
    attention = BeamAttention(model, prefix, width, max(1, num_items - 1))
    table, inverse = model.item_embedding.weight[1:], model.inverse_norms[1:]
    states, best = state.unsqueeze(0), torch.zeros(1)
    chosen = torch.zeros(1, 0, dtype=torch.int64)  # columns: item - 1
    scores = torch.zeros(1, 0)
    ancestors = torch.zeros(1, 0, dtype=torch.int64)
    for step in range(num_items):
        if step:
            states = _advance(model, attention, chosen[:, -1] + 1, ancestors, step)
        taken = None if slate.allow_repeats else chosen
        drawn = None if noise is None else gumbel_noise(config.num_items, noise).to(state.device)
        best, parents, columns, cosines = best_items(
            l2_normalize(states.float()), table, inverse, masked, taken, best, slate.temperature, width, drawn
        )
        chosen = torch.cat([chosen[parents], columns.unsqueeze(1)], 1)
        scores = torch.cat([scores[parents], cosines.unsqueeze(1)], 1)
        rows = step * width + torch.arange(len(parents))
        ancestors = torch.cat([ancestors[parents], rows.unsqueeze(1)], 1)
    return Slates(
        item_ids=(chosen + 1).unsqueeze(0),
        scores=scores.unsqueeze(0),
        log_probabilities=None if slate.method == "greedy" else best.unsqueeze(0),
    )


def _advance(model: PagedModel, attention: BeamAttention, items: Tensor, ancestors: Tensor, step: int) -> Tensor:
    """The state [W, D] after each beam's last chosen item [W]."""
    prefix = attention.prefix
    last = int(prefix.times[-1])
    gap = torch.full_like(items, prefix.query_time - last if step == 1 else 0)
    x = model.embed_chosen(items, prefix.length + step - 1, gap)
    ancestors = ancestors.contiguous()
    for index, layer in enumerate(model.layers):
        x = layer.around(x, lambda uvqk, index=index, layer=layer: attention(index, layer, uvqk, ancestors))
    return x


def best_items(
    states: Tensor,
    table: Tensor,
    inverse_norms: Tensor,
    masked: Tensor | None,
    taken: Tensor | None,
    totals: Tensor,
    temperature: float,
    width: int,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `width` best continuations of beams: totals [n], parents [n], columns [n] and cosines [n], best first.

    states float32 [W, D] of norm 1; table float32 [num_items, D] and 1 / the norms of its rows; masked float32
    [num_items], -inf where no beam may go; taken int64 [W, s], columns that each beam has already; totals [W] so far.
    With `noise` float32 [num_items] (W = 1) the continuation is drawn: the highest cosine / temperature + noise.
    """
    num_beams, num_items = len(states), len(table)
    padded = -(-num_items // GROUP) * GROUP
    cosines = torch.empty(num_beams, padded)
    cosines[:, num_items:] = -torch.inf
    highest = torch.empty(num_beams, padded // GROUP)
    mass = torch.zeros(num_beams)
    for begin in range(0, num_items, HEAD_COLUMNS):
        end = min(begin + HEAD_COLUMNS, num_items)
        part = cosines[:, begin:end]
        torch.mm(states, table[begin:end].T, out=part)
        part.mul_(inverse_norms[begin:end])
        if masked is not None:
            part.add_(masked[begin:end])
        if taken is not None and taken.shape[1]:
            if num_items <= HEAD_COLUMNS:
                part.scatter_(1, taken, -torch.inf)
            else:
                rows, which = ((taken >= begin) & (taken < end)).nonzero(as_tuple=True)
                part[rows, taken[rows, which] - begin] = -torch.inf
        grouped = cosines[:, begin : min(begin + HEAD_COLUMNS, padded)]
        torch.amax(grouped.unflatten(1, (-1, GROUP)), 2, out=highest[:, begin // GROUP : -(-end // GROUP)])
        # cosines are at most 1, so the sum needs no maximum taken off unless the temperature is low
        mass += ((part - 1.0) / temperature).exp_().sum(1)
    log_mass = mass.log() + 1.0 / temperature
    if noise is not None:
        column = (cosines[0, :num_items] / temperature + noise).argmax()
        cosine = cosines[0, column]
        total = totals[0] + cosine / temperature - log_mass[0]
        return total.view(1), torch.zeros(1, dtype=torch.int64), column.view(1), cosine.view(1)
    if num_beams * num_items <= 4096:  # too few to be worth the detour
        keys = (cosines[:, :num_items] / temperature + (totals - log_mass).unsqueeze(1)).nan_to_num_(
            nan=-torch.inf, neginf=-torch.inf
        )
        best, flat = keys.flatten().topk(min(width, keys.numel()))
        parents, columns = flat // num_items, flat % num_items
    else:
        offset = (totals - log_mass).unsqueeze(1)
        keys = (highest / temperature + offset).nan_to_num_(nan=-torch.inf, neginf=-torch.inf).flatten()
        # every one of the best items is in one of the `width` groups of the highest maxima
        groups = keys.topk(min(width, len(keys)), sorted=False).indices
        owner, group = groups // highest.shape[1], groups % highest.shape[1]
        inside = cosines.view(num_beams, -1, GROUP)[owner, group] / temperature + offset[owner]
        best, flat = inside.nan_to_num_(nan=-torch.inf, neginf=-torch.inf).flatten().topk(width)
        parents, columns = owner[flat // GROUP], group[flat // GROUP] * GROUP + flat % GROUP
    real = best.isfinite()
    if not bool(real.all()):
        best, parents, columns = best[real], parents[real], columns[real]
    return best, parents, columns, cosines[parents, columns]
