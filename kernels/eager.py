"""The ops in plain PyTorch, on any device and in any float type: what runs on a CPU, and what kernels are held against.

Tensors as in the ops' `op.py`. Nothing here is written to be fast; user by user, so padding never enters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.hstu_attention.op import RelativeBias
from kernels.paged_hstu_attention.op import PagedBias


def relative_bias(
    position: Tensor, key_position: Tensor, next_times: Tensor, times: Tensor, tables: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Bias [Q, L] of rows at position [Q] that see rows at key_position [L]; tables position, time, bucket edges."""
    position_bias, time_bias, edges = tables
    middle = (len(position_bias) - 1) // 2
    distance = (key_position - position.unsqueeze(1)).clamp(-middle, 0)
    elapsed = (next_times.unsqueeze(1) - times).abs().to(torch.float32)
    return position_bias[distance + middle] + time_bias[torch.bucketize(elapsed, edges, right=True)]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float, seen: Tensor | None, max_length: int) -> Tensor:
    """Σ_j SiLU(q·k + bias) / N · v_j [Q, H, dv] of one user: rows [Q or L, H, ·], seen [Q, L]."""
    weights = F.silu(torch.einsum("ihd,jhd->hij", q, k) + bias) / max_length
    if seen is not None:
        weights = weights * seen
    return torch.einsum("hij,jhd->ihd", weights.to(v.dtype), v)


def _visible(length: int, targets: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions [L] and visibility [L, L] of a user's rows, the last `targets` of which are targets."""
    row = torch.arange(length, device=device)
    i, j = row.unsqueeze(1), row.unsqueeze(0)
    return row.clamp(max=length - targets), (j == i) | ((j < i) & (j < length - targets))


def attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, num_targets: Tensor, max_length: int, bias: RelativeBias | None
) -> Tensor:
    """o [T, H, dv] of jagged rows, in the inputs' type."""
    out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=v.dtype, device=v.device)
    bounds = offsets.tolist()
    for user, targets in enumerate(num_targets.tolist()):
        rows = slice(bounds[user], bounds[user + 1])
        position, seen = _visible(bounds[user + 1] - bounds[user], targets, q.device)
        extra: Tensor | float = 0.0
        if bias is not None:
            tables = (bias.position_bias.to(q.dtype), bias.time_bias.to(q.dtype), bias.bucket_edges)
            extra = relative_bias(position, position, bias.next_times[rows], bias.times[rows], tables)
        out[rows] = attend(q[rows], k[rows], v[rows], extra, seen, max_length)
    return out


def gate(u: Tensor, o: Tensor, epsilon: float) -> Tensor:
    """u ⊙ LN(o) [T, H, dv], normalised over all heads."""
    normal = F.layer_norm(o.flatten(1).float(), (o[0].numel(),), eps=epsilon) if o.dtype != torch.float64 else (
        F.layer_norm(o.flatten(1), (o[0].numel(),), eps=epsilon)
    )  # fmt: skip
    return u * normal.to(u.dtype).view_as(u)


def _cached(cache: Tensor, table: Tensor, length: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [L, H, dqk], values [L, H, dv] and slots [L] of a request's first `length` events."""
    page_size = cache.shape[2]
    j = torch.arange(length, device=cache.device)
    page = table.long()[j // page_size]
    rows = cache[page, :, j % page_size]
    return rows[..., :width], rows[..., width:], page * page_size + j % page_size


def decode(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, max_length: int, bias: PagedBias | None
) -> Tensor:  # fmt: skip
    """o [R, H, dv] of each request's newest event, which is in the pages."""
    rows = []
    for request, length in enumerate(lengths.tolist()):
        k, v, slots = _cached(cache, table[request], length, q.shape[2])
        extra: Tensor | float = 0.0
        if bias is not None:
            tables = (bias.position_bias.to(q.dtype), bias.time_bias.to(q.dtype), bias.bucket_edges)
            at = torch.arange(length, device=q.device)
            extra = relative_bias(at[-1:], at, bias.next_times[request : request + 1], bias.times[slots], tables)
        rows.append(attend(q[request : request + 1], k, v, extra, None, max_length))
    return torch.cat(rows)


def extend(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, starts: Tensor, contexts: Tensor, num_targets: Tensor,
    table: Tensor, max_length: int, bias: PagedBias | None,
) -> Tensor:  # fmt: skip
    """o [T, H, dv] of new rows after their cached events."""
    out, bounds = torch.zeros_like(v), starts.tolist()
    for request, (context, targets) in enumerate(zip(contexts.tolist(), num_targets.tolist(), strict=True)):
        rows = slice(bounds[request], bounds[request + 1])
        past_k, past_v, slots = _cached(cache, table[request], context, q.shape[2])
        position, seen = _visible(bounds[request + 1] - bounds[request], targets, q.device)
        extra: Tensor | float = 0.0
        if bias is not None and bias.row_times is not None:
            tables = (bias.position_bias.to(q.dtype), bias.time_bias.to(q.dtype), bias.bucket_edges)
            keys = torch.cat([torch.arange(context, device=q.device), context + position])
            times = torch.cat([bias.times[slots], bias.row_times[rows]])
            extra = relative_bias(context + position, keys, bias.next_times[rows], times, tables)
        whole = torch.cat([seen.new_ones((len(seen), context)), seen], dim=1)
        out[rows] = attend(
            q[rows], torch.cat([past_k, k[rows]]), torch.cat([past_v, v[rows]]), extra, whole, max_length
        )
    return out


def write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """k and v stand in the pages at their slots; negative ones are dropped."""
    kept = slots >= 0
    page_size = cache.shape[2]
    cache[slots[kept] // page_size, :, slots[kept] % page_size] = torch.cat([k, v], dim=-1)[kept].to(cache.dtype)


def uvqk_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(x weightᵀ + bias) in x's type."""
    return F.silu(F.linear(x, weight, bias.to(x.dtype)))


def uvqk_silu_int8(
    x: Tensor, weight: Tensor, bias: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """SiLU of int8 products scaled by float32 scales [M] and [N], computed in float64: exact sums."""
    total = x.double() @ weight.double().T * scales[0].double().unsqueeze(1) * scales[1].double()
    return F.silu(total + bias.double()).to(dtype)


def interaction(x: Tensor, with_self: bool) -> Tensor:
    """The packed lower triangle [B, P] of x xᵀ, x [B, F, D]."""
    i, j = torch.tril_indices(x.shape[1], x.shape[1], 0 if with_self else -1, device=x.device)
    return (x @ x.transpose(1, 2))[:, i, j]


def embedding_bag(table: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Sums [B, D] of table rows."""
    return F.embedding_bag(ids, table, offsets, mode="sum", include_last_offset=True)
