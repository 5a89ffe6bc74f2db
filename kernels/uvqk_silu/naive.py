"""The truth about the fused projection."""

from __future__ import annotations

from kernels.hstu_attention.naive import Array, silu


def uvqk_silu(x: Array, weight: Array, bias: Array) -> Array:
    """SiLU(x Wᵀ + b) [M, N]: x [M, K], weight [N, K], bias [N]."""
    return silu(x @ weight.T + bias)


def uvqk_silu_int8(x: Array, weight: Array, bias: Array, x_scale: Array, weight_scale: Array) -> Array:
    """The same of integers x [M, K] and weight [N, K], scaled per row x_scale [M] and per column weight_scale [N]."""
    total = x.astype(float) @ weight.astype(float).T
    return silu(total * x_scale[:, None] * weight_scale + bias)
