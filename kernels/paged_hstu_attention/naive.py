"""The truth about HSTU attention on pages: keys and values are looked up event by event, then `hstu_attention.naive`.

A page holds `block` events: pages [P, H, block, dqk + dv], key then value, after SiLU. Event t of a request is in
page table[t // block], row t % block; its time is times[page · block + row].
"""

from __future__ import annotations

import numpy as np

from kernels.hstu_attention.naive import Array, gate, silu, split


def paged_attention(
    uvqk: Array, pages: Array, table: Array, context: int, buckets: Array, position_bias: Array, time_bias: Array,
    *, v_dim: int, epsilon: float = 1e-6,
) -> Array:  # fmt: skip
    """Gated output [Q, H·dv] of one request's Q new rows after `context` events; `pages` gains their keys and values.

    uvqk [Q, W] before SiLU; table int [≥ ⌈(context + Q) / block⌉]; buckets int [Q, context + Q].
    """
    _, heads, block, width = pages.shape
    max_length = (len(position_bias) + 1) // 2
    u, v, q, k = split(uvqk, heads, v_dim)
    for i in range(len(uvqk)):
        page, row = table[(context + i) // block], (context + i) % block
        pages[page, :, row, : width - v_dim], pages[page, :, row, width - v_dim :] = k[i], v[i]
    out = np.zeros_like(u)
    for i in range(len(uvqk)):
        attended = np.zeros((heads, v_dim), dtype=u.dtype)
        for t in range(context + i + 1):
            event = pages[table[t // block], :, t % block]
            bias = position_bias[t - context - i + max_length - 1] + time_bias[buckets[i, t]]
            weight = silu((q[i] * event[:, : width - v_dim]).sum(-1) + bias) / max_length
            attended += weight[:, None] * event[:, width - v_dim :]
        out[i] = gate(u[i], attended, epsilon)
    return out
