"""HSTU in eager PyTorch: the definition that every other runtime is held against.

Source of the mathematics: Zhai et al., "Actions Speak Louder than Words" (2024), and Meta's public
research code (generative-recommenders, `research/modeling/sequential/hstu.py`), which this reproduces
bit for bit in fp32 when the config asks for the research variant. Shape letters: `hstu.signature`.

    x_i   = √D · item_i + position_i (+ action_i + gap_i), zero after the end of the history
    u,v,q,k = SiLU(LN(x) · W_uvqk)
    a_ij  = SiLU(q_i · k_j + position_bias[j - i] + time_bias[bucket(t_{i+1} - t_j)]) / N     for j <= i
    x     ← x + W_o (u ⊙ LN(a · v))
    user  = x at the last event, L2-normalised
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hstu.config import L2_EPS, LAYER_NORM_EPS, NUM_TIME_BUCKETS, HSTUConfig
from hstu.errors import InputError
from hstu.signature import num_results
from hstu.time_buckets import THRESHOLDS, time_buckets


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """A padded batch: item_ids, actions, timestamps int64 [B, L]; lengths, query_time int64 [B]."""

    item_ids: Tensor
    timestamps: Tensor
    lengths: Tensor
    query_time: Tensor
    actions: Tensor | None = None

    @property
    def next_timestamps(self) -> Tensor:
        """t_{i+1} [B, L]: the next event's time; after the last event stands the query time."""
        following = F.pad(self.timestamps[:, 1:], (0, 1))
        position = torch.arange(self.timestamps.shape[1], device=self.lengths.device)
        is_last = position == (self.lengths - 1).unsqueeze(1)
        return torch.where(is_last, self.query_time.unsqueeze(1), following)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without affine parameters, eps 1e-6."""
    return F.layer_norm(x, (x.shape[-1],), eps=LAYER_NORM_EPS)


def l2_normalize(x: Tensor) -> Tensor:
    """x / max(‖x‖, 1e-6) over the last dimension."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=L2_EPS)


class HSTUAttention(nn.Module):
    """Pointwise attention of one layer, from the fused projection to the gated output.

    This module is the unit that surgery turns into one function and that kernels replace, for the
    history (`forward`) and for candidates (`candidates`).
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config = config
        self.position_bias = nn.Parameter(torch.zeros(2 * config.max_length - 1))
        self.time_bias = nn.Parameter(torch.zeros(NUM_TIME_BUCKETS + 1))

    def split(self, uvqk: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """SiLU of the projection [B, L, W], split into u [B, L, H·dv], v [B, L, H, dv], q and k [B, L, H, dqk]."""
        c = self.config
        hv, hqk = c.num_heads * c.v_dim, c.num_heads * c.qk_dim
        u, v, q, k = F.silu(uvqk).split([hv, hv, hqk, hqk], dim=-1)
        heads = (c.num_heads, -1)
        return u, v.unflatten(-1, heads), q.unflatten(-1, heads), k.unflatten(-1, heads)

    def relative_bias(self, distance: Tensor, buckets: Tensor) -> Tensor:
        """Position bias at distance j - i, plus time bias: int64 tensors of one shape in, float32 out."""
        return self.position_bias[distance + self.config.max_length - 1] + self.time_bias[buckets]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        """Σ_j SiLU(q·k + bias) / N over allowed j: q [B, Q, H, dqk], k, v [B, L, H, ·], bias, mask [B, Q, L]."""
        scores = torch.einsum("bqhd,blhd->bhql", q, k) + bias.unsqueeze(1)
        weights = F.silu(scores) / self.config.max_length * mask.unsqueeze(1)
        return torch.einsum("bhql,blhd->bqhd", weights, v)

    def forward(self, uvqk: Tensor, buckets: Tensor, lengths: Tensor) -> Tensor:
        """Gated output u ⊙ LN(a·v) [B, L, H·dv] from the projection [B, L, W], before SiLU.

        buckets: int64 [B, L, L], row i column j is the bucket of t_{i+1} - t_j; lengths: int64 [B].
        """
        u, v, q, k = self.split(uvqk)
        position = torch.arange(uvqk.shape[1], device=uvqk.device)
        distance = position.unsqueeze(0) - position.unsqueeze(1)  # [i, j] = j - i
        mask = (distance <= 0) & (position < lengths.view(-1, 1, 1))
        attended = self.attend(q, k, v, self.relative_bias(distance, buckets), mask.to(uvqk.dtype))
        return u * layer_norm(attended.flatten(-2))

    def candidates(
        self, uvqk: Tensor, candidate_uvqk: Tensor, buckets: Tensor, self_buckets: Tensor, position: Tensor
    ) -> Tensor:
        """Gated output [B, C, H·dv] of candidates that see the history before `position` and themselves.

        uvqk [B, L, W] and candidate_uvqk [B, C, W] before SiLU; position int64 [B, C] (or [B, 1]): where each
        candidate stands, which is how many events it sees; buckets int64 [B, C or 1, L] of query time - t_j;
        self_buckets int64 [B, C or 1] of query time - candidate time.
        """
        _, v, _, k = self.split(uvqk)
        cand_u, cand_v, cand_q, cand_k = self.split(candidate_uvqk)
        history = torch.arange(uvqk.shape[1], device=uvqk.device)
        distance = history - position.unsqueeze(-1)  # [B, C or 1, L] = j - i
        mask = (distance < 0).to(uvqk.dtype)
        attended = self.attend(cand_q, k, v, self.relative_bias(distance.clamp(max=0), buckets), mask)
        own_bias = self.relative_bias(torch.zeros_like(position), self_buckets).unsqueeze(-1)
        own = F.silu((cand_q * cand_k).sum(-1) + own_bias) / self.config.max_length
        attended = attended + own.unsqueeze(-1) * cand_v
        return cand_u * layer_norm(attended.flatten(-2))

    def extend(self, uvqk: Tensor, cache: Tensor, buckets: Tensor, cached_lengths: Tensor, lengths: Tensor) -> Tensor:
        """Gated output [B, E, H·dv] of E new events after a cached history.

        The sum over j needs no softmax, so the cached part and the new part simply add. uvqk [B, E, W] before
        SiLU; cache [B, P, H·(dqk+dv)] holds the rows (`cache_rows`) of the events before; buckets int64
        [B, E, P+E]; cached_lengths and lengths int64 [B]: how many cached and new events each row has.
        """
        c = self.config
        u, v, q, k = self.split(uvqk)
        cached_k, cached_v = cache.split([c.num_heads * c.qk_dim, c.num_heads * c.v_dim], dim=-1)
        heads = (c.num_heads, -1)
        past = torch.arange(cache.shape[1], device=uvqk.device)
        new = torch.arange(uvqk.shape[1], device=uvqk.device)
        first = cached_lengths.view(-1, 1, 1)
        past_distance = past - first - new.unsqueeze(-1)  # [B, E, P] = j - i
        new_distance = (new.unsqueeze(0) - new.unsqueeze(1)).expand(uvqk.shape[0], -1, -1)  # [B, E, E]
        past_mask = (past < first).expand(past_distance.shape)
        new_mask = (new_distance <= 0) & (new < lengths.view(-1, 1, 1))
        furthest = 1 - c.max_length  # distances of masked entries are clamped into the table
        distance = torch.cat([past_distance, new_distance], dim=-1).clamp(min=furthest, max=0)
        mask = torch.cat([past_mask, new_mask], dim=-1).to(uvqk.dtype)
        # what stands in the cache after its end never matters: 0 · NaN would
        alive = (past < first.squeeze(-1)).unsqueeze(-1)
        keys = torch.cat([torch.where(alive, cached_k, torch.zeros_like(cached_k)).unflatten(-1, heads), k], dim=1)
        values = torch.cat([torch.where(alive, cached_v, torch.zeros_like(cached_v)).unflatten(-1, heads), v], dim=1)
        attended = self.attend(q, keys, values, self.relative_bias(distance, buckets), mask)
        return u * layer_norm(attended.flatten(-2))

    def jagged(
        self, uvqk: Tensor, offsets: Tensor, longest: int, times: Tensor, next_times: Tensor, bucket_edges: Tensor
    ) -> Tensor:
        """`forward` of T jagged rows through the op registry (`kernels.ops`): [T, W] before SiLU → [T, H·dv].

        offsets int64 [B+1], of which the caller knows that they rise and that no user has more than `longest` rows;
        times and next_times int64 [T]; bucket_edges float32 [129]. Inference alone: the op has no gradient.
        """
        from kernels import ops

        c = self.config
        u, v, q, k = self.split(uvqk)
        gated = ops.gated_attention(
            u.unflatten(-1, (c.num_heads, -1)), q, k, v, offsets, offsets.new_zeros(len(offsets) - 1), longest,
            c.max_length, self.position_bias, self.time_bias, bucket_edges, times, next_times, LAYER_NORM_EPS, True,
        )  # fmt: skip
        return gated.flatten(-2)  # type: ignore[no-any-return]

    def cache_rows(self, uvqk: Tensor) -> Tensor:
        """SiLU of k and v [B, E, H·(dqk+dv)] (`hstu.signature.CacheSpec`) from the projection [B, E, W]."""
        hv, hqk = self.config.num_heads * self.config.v_dim, self.config.num_heads * self.config.qk_dim
        _, v, _, k = uvqk.split([hv, hv, hqk, hqk], dim=-1)
        return F.silu(torch.cat([k, v], dim=-1))


class HSTUExtendAttention(nn.Module):
    """`HSTUAttention.extend` as a module without weights, so that an exported graph tells its nodes apart."""

    def forward(self, attention: HSTUAttention, *inputs: Tensor) -> Tensor:
        """What `attention.extend(*inputs)` returns."""
        return attention.extend(*inputs)


class HSTUCacheRows(nn.Module):
    """`HSTUAttention.cache_rows` as a module without weights, so that an exported graph tells its nodes apart."""

    def forward(self, attention: HSTUAttention, uvqk: Tensor) -> Tensor:
        """What `attention.cache_rows(uvqk)` returns."""
        return attention.cache_rows(uvqk)


class HSTUCandidateAttention(nn.Module):
    """`HSTUAttention.candidates` as a module without weights, so that an exported graph tells its nodes apart."""

    def forward(self, attention: HSTUAttention, *inputs: Tensor) -> Tensor:
        """What `attention.candidates(*inputs)` returns."""
        return attention.candidates(*inputs)


class HSTULayer(nn.Module):
    """One layer: x + W_o(attention(LN(x) · W_uvqk))."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.uvqk = nn.Linear(config.embedding_dim, config.uvqk_dim, bias=False)
        self.attention = HSTUAttention(config)
        self.candidate_attention = HSTUCandidateAttention()
        self.extend_attention = HSTUExtendAttention()
        self.cache_rows = HSTUCacheRows()
        self.output = nn.Linear(config.num_heads * config.v_dim, config.embedding_dim)

    def project(self, x: Tensor) -> Tensor:
        """LN(x) · W_uvqk [.., W], before SiLU."""
        return self.uvqk(layer_norm(x))  # type: ignore[no-any-return]


class TaskHeads(nn.Module):
    """One probability per task from a candidate's state: sigmoid(W_2 SiLU(W_1 x + b_1) + b_2)."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.embedding_dim, config.head_dim)
        self.logits = nn.Linear(config.head_dim, len(config.tasks))

    def forward(self, state: Tensor) -> Tensor:
        """Logits [.., T] of states [.., D]."""
        return self.logits(F.silu(self.hidden(layer_norm(state))))  # type: ignore[no-any-return]


class HSTU(nn.Module):
    """The whole model; `retrieve` and `rank` are the entry points that get compiled."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.num_items + 1, config.embedding_dim, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_length, config.embedding_dim)
        if config.num_actions:
            self.action_embedding = nn.Embedding(config.num_actions, config.embedding_dim)
        if config.num_gap_buckets:
            self.gap_embedding = nn.Embedding(config.num_gap_buckets, config.embedding_dim)
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))
        if config.tasks:
            self.task_heads = TaskHeads(config)

    def embed(self, item_ids: Tensor, position: Tensor, actions: Tensor | None, gaps: Tensor) -> Tensor:
        """Input rows [.., D] of items at positions, with their action and the time since the event before."""
        x = self.item_embedding(item_ids) * self.config.item_scale + self.position_embedding(position)
        if self.config.num_actions:
            if actions is None:
                raise InputError("this model was trained with actions", expected="actions int64, 0 = none")
            x = x + self.action_embedding(actions)
        if self.config.num_gap_buckets:
            x = x + self.gap_embedding(time_buckets(gaps).clamp(max=self.config.num_gap_buckets - 1))
        return x  # type: ignore[no-any-return]

    def embed_history(self, history: History) -> Tensor:
        """x [B, L, D] before the first layer, zero after the end of each history."""
        position = torch.arange(history.item_ids.shape[1], device=history.item_ids.device)
        before = F.pad(history.timestamps[:, :-1], (1, 0))
        gaps = torch.where(position > 0, history.timestamps - before, torch.zeros_like(before))
        x = self.embed(history.item_ids, position, history.actions, gaps)
        return x * (position < history.lengths.unsqueeze(1)).unsqueeze(-1).to(x.dtype)

    def encode(self, history: History) -> Tensor:
        """The state [B, L, D] after the last layer at every event; rows after the end mean nothing."""
        buckets = time_buckets(history.next_timestamps.unsqueeze(2) - history.timestamps.unsqueeze(1))
        x = self.embed_history(history)
        for layer in self.layers:
            x = x + layer.output(layer.attention(layer.project(x), buckets, history.lengths))
        return x

    def encode_jagged(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        offsets: Tensor,
        query_time: Tensor,
        actions: Tensor | None = None,
        *,
        kernels: bool = False,
    ) -> Tensor:
        """The states [T, D] of T events in all, oldest first, user b at [offsets[b], offsets[b+1]); as `encode`.

        Everything but the attention itself runs on the T real rows, and with `kernels` that too, through the op
        registry: compiled kernels on a GPU, without gradients.
        """
        lengths = offsets.diff()
        longest = max(1, int(lengths.max())) if len(lengths) else 1
        inside = torch.arange(longest, device=offsets.device) < lengths.unsqueeze(1)

        def pad(rows: Tensor) -> Tensor:
            return rows.new_zeros((len(lengths), longest, *rows.shape[1:])).masked_scatter(
                inside.view(*inside.shape, *[1] * (rows.dim() - 1)), rows
            )

        history = History(
            item_ids=pad(item_ids),
            timestamps=pad(timestamps),
            lengths=lengths,
            query_time=query_time,
            actions=None if actions is None else pad(actions),
        )
        x = self.embed_history(history)[inside]
        if kernels:
            from kernels.hstu_attention.op import bucket_edges

            edges, next_times = bucket_edges(THRESHOLDS, x.device), history.next_timestamps[inside]
            for layer in self.layers:
                rows = layer.attention.jagged(layer.project(x), offsets, longest, timestamps, next_times, edges)
                x = x + layer.output(rows)
            return x
        buckets = time_buckets(history.next_timestamps.unsqueeze(2) - history.timestamps.unsqueeze(1))
        for layer in self.layers:
            x = x + layer.output(layer.attention(pad(layer.project(x)), buckets, lengths)[inside])
        return x

    def user_embedding(self, states: Tensor, lengths: Tensor) -> Tensor:
        """The L2-normalised state at the last event: [B, L, D], [B] → [B, D]."""
        last = (lengths - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, states.shape[-1])
        return l2_normalize(states.gather(1, last).squeeze(1))

    def item_scores(self, user_embedding: Tensor) -> Tensor:
        """Cosine with every real item: [B, D] → [B, num_items], column 0 is item 1."""
        return user_embedding @ l2_normalize(self.item_embedding.weight[1:]).T

    def retrieve(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """user_embedding [B, D], top_item_ids int64 [B, K], top_scores [B, K] over the whole corpus, best first."""
        embedding = self.user_embedding(self.encode(history), history.lengths)
        scores, columns = self.item_scores(embedding).topk(num_results(self.config))
        return embedding, columns + 1, scores

    def extend(
        self, new: History, cache: Tensor, cached_timestamps: Tensor, cached_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `retrieve` returns for the whole history, computed from the cached part and the new events alone.

        cache: float32 [B, layers, P, H·(dqk+dv)], cached_timestamps int64 [B, P], cached_lengths int64 [B] of the
        events that already have a successor; `new` starts with the last event that had none (its row depends on
        the time of what follows it) and holds at least one event a row. A cached length of 0 computes everything
        (P is 1 or more all the same).
        Also returns the new events' cache rows [B, layers, E, H·(dqk+dv)], zero after the end of each history: all
        but the last of a history may be kept.
        """
        steps = torch.arange(new.item_ids.shape[1], device=cache.device)
        position = (cached_lengths.unsqueeze(1) + steps).clamp(max=self.config.max_length - 1)
        last_cached = cached_timestamps.gather(1, (cached_lengths - 1).clamp(min=0).unsqueeze(1))
        before = torch.cat([last_cached, new.timestamps[:, :-1]], dim=1)
        gaps = torch.where(position > 0, new.timestamps - before, torch.zeros_like(before))
        x = self.embed(new.item_ids, position, new.actions, gaps)
        inside = (steps < new.lengths.unsqueeze(1)).unsqueeze(-1).to(x.dtype)
        x = x * inside
        times = torch.cat([cached_timestamps, new.timestamps], dim=1)
        buckets = time_buckets(new.next_timestamps.unsqueeze(2) - times.unsqueeze(1))
        rows = []
        for index, layer in enumerate(self.layers):
            uvqk = layer.project(x)
            rows.append(layer.cache_rows(layer.attention, uvqk))
            gated = layer.extend_attention(layer.attention, uvqk, cache[:, index], buckets, cached_lengths, new.lengths)
            x = x + layer.output(gated)
        embedding = self.user_embedding(x, new.lengths)
        scores, columns = self.item_scores(embedding).topk(num_results(self.config))
        return embedding, columns + 1, scores, torch.stack(rows, dim=1) * inside.unsqueeze(1)

    def rank_logits(
        self, history: History, candidate_ids: Tensor, *, position: Tensor | None = None, time: Tensor | None = None
    ) -> Tensor:
        """Task logits [B, C, T] of candidates int64 [B, C] that see the history and themselves, not one another.

        By default every candidate stands after the last event, at the query time. In training `position` and
        `time` (int64 [B, C]) put candidate c where event `position` stood: it sees the events before that.
        """
        if position is None:
            position = history.lengths.unsqueeze(1)
        if time is None:
            time = history.query_time.unsqueeze(1)
        before = history.timestamps.gather(1, (position - 1).clamp(min=0).expand(time.shape))
        gaps = torch.where(position > 0, time - before, torch.zeros_like(time)).expand(candidate_ids.shape)
        buckets = time_buckets(time.unsqueeze(2) - history.timestamps.unsqueeze(1))  # [B, C or 1, L]
        own_buckets = torch.zeros_like(time)  # a candidate's own time is the query time
        history_buckets = time_buckets(history.next_timestamps.unsqueeze(2) - history.timestamps.unsqueeze(1))
        x = self.embed_history(history)
        y = self.embed(candidate_ids, position.expand(candidate_ids.shape), torch.zeros_like(candidate_ids), gaps)
        for index, layer in enumerate(self.layers):
            uvqk = layer.project(x)
            y = y + layer.output(
                layer.candidate_attention(layer.attention, uvqk, layer.project(y), buckets, own_buckets, position)
            )
            if index + 1 < len(self.layers):
                x = x + layer.output(layer.attention(uvqk, history_buckets, history.lengths))
        return self.task_heads(y)  # type: ignore[no-any-return]

    def rank(self, history: History, candidate_ids: Tensor) -> Tensor:
        """Probability of every task for every candidate: [B, C] → [B, C, T]."""
        return torch.sigmoid(self.rank_logits(history, candidate_ids))


def history_from_feeds(feeds: Mapping[str, Tensor]) -> History:
    """A padded batch from tensors named as in `hstu.signature`."""
    return History(
        item_ids=feeds["item_ids"],
        timestamps=feeds["timestamps"],
        lengths=feeds["lengths"],
        query_time=feeds["query_time"],
        actions=feeds.get("actions"),
    )
