"""The truth about HSTU attention: one user at a time, in whatever precision it is given.

    h = SiLU(uvqk), split in the order u, v, q, k
    o_i = Σ_j SiLU(q_i · k_j + position_bias[j - i + N - 1] + time_bias[bucket_ij]) v_j / N
    out = u ⊙ (o - mean(o)) / √(var(o) + ε), mean and variance over all heads together

Source: Zhai et al. 2024 and generative-recommenders `research/modeling/sequential/hstu.py`. Letters as in
`hstu.signature`; every array is numpy, floats of one dtype (float64 to judge the fast kernels).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def silu(x: Array) -> Array:
    """x · sigmoid(x), without overflow."""
    return np.asarray(x * np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x))))


def split(uvqk: Array, heads: int, v_dim: int) -> tuple[Array, Array, Array, Array]:
    """SiLU of rows [L, W], as u [L, H·dv], v [L, H, dv], q [L, H, dqk], k [L, H, dqk]."""
    hv, hqk = heads * v_dim, uvqk.shape[1] // 2 - heads * v_dim
    u, v, q, k = np.split(silu(uvqk), [hv, 2 * hv, 2 * hv + hqk], axis=1)
    qk_dim = hqk // heads
    return u, v.reshape(-1, heads, v_dim), q.reshape(-1, heads, qk_dim), k.reshape(-1, heads, qk_dim)


def gate(u: Array, attended: Array, epsilon: float) -> Array:
    """u ⊙ LN(attended) for one row: u [H·dv], attended [H, dv]."""
    o = attended.reshape(-1)
    return np.asarray(u * (o - o.mean()) / np.sqrt(o.var() + epsilon))


def positions(length: int, num_targets: int = 0) -> Array:
    """Where each of a user's rows [L] stands: targets, the last rows, all stand where the history ends."""
    return np.asarray(np.minimum(np.arange(length), length - num_targets))


def visible(length: int, num_targets: int = 0) -> Array:
    """Which rows j a row i sees [L, L]: those up to itself, but of the targets only itself."""
    i, j = np.arange(length)[:, None], np.arange(length)
    return np.asarray((j <= i) & ((j < length - num_targets) | (j == i)))


def relative_bias(position: Array, buckets: Array, position_bias: Array, time_bias: Array) -> Array:
    """Bias [L, L] of rows at `position` [L] that see each other's buckets [L, L], in tables [2N-1] and [129]."""
    middle = (len(position_bias) - 1) // 2
    distance = np.minimum(position - position[:, None], 0)
    return np.asarray(position_bias[distance + middle] + time_bias[buckets])


def attend(
    q: Array, k: Array, v: Array, bias: Array | float, *, max_length: int, num_targets: int = 0
) -> Array:  # fmt: skip
    """o [L, H, dv] of one user's q, k [L, H, dqk] and v [L, H, dv], after SiLU, with bias [L, L]."""
    scores = np.einsum("ihd,jhd->hij", q, k) + bias
    weights = silu(scores) / max_length * visible(len(q), num_targets)
    return np.asarray(np.einsum("hij,jhd->ihd", weights, v))


def attention(
    uvqk: Array,
    buckets: Array,
    position_bias: Array,
    time_bias: Array,
    *,
    heads: int,
    v_dim: int,
    epsilon: float = 1e-6,
) -> Array:
    """Gated output [L, H·dv] of one user's L events: uvqk [L, W] before SiLU, buckets [L, L]."""
    length, max_length = len(uvqk), (len(position_bias) + 1) // 2
    u, v, q, k = split(uvqk, heads, v_dim)
    bias = relative_bias(positions(length), np.tril(buckets), position_bias, time_bias)
    attended = attend(q, k, v, bias, max_length=max_length)
    return np.stack([gate(u[i], attended[i], epsilon) for i in range(length)]) if length else np.zeros_like(u)


def candidates(
    uvqk: Array, candidate_uvqk: Array, buckets: Array, own_buckets: Array, position: Array, position_bias: Array,
    time_bias: Array, *, heads: int, v_dim: int, epsilon: float = 1e-6,
) -> Array:  # fmt: skip
    """Gated output [C, H·dv] of candidates that see events before `position` [C] and themselves: buckets [C, L]."""
    max_length = (len(position_bias) + 1) // 2
    _, v, _, k = split(uvqk, heads, v_dim)
    cand_u, cand_v, cand_q, cand_k = split(candidate_uvqk, heads, v_dim)
    out = np.zeros_like(cand_u)
    for c, p in enumerate(position):
        bias = position_bias[np.arange(p) - p + max_length - 1] + time_bias[buckets[c, :p]]
        attended = np.einsum("hj,jhd->hd", silu(np.einsum("hd,jhd->hj", cand_q[c], k[:p]) + bias), v[:p])
        own = silu((cand_q[c] * cand_k[c]).sum(-1) + position_bias[max_length - 1] + time_bias[own_buckets[c]])
        out[c] = gate(cand_u[c], (attended + own[:, None] * cand_v[c]) / max_length, epsilon)
    return out
