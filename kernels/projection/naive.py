"""The truth about the fused projection."""

from __future__ import annotations

import numpy as np

from kernels.cpu.library import Array


def layer_norm(rows: Array, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon), row by row."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    result: Array = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + epsilon)
    return result


def quantized(rows: Array) -> tuple[Array, Array]:
    """Integers |q| <= 127 and scales [M] with rows = scale · q, symmetrically, row by row; of zeros the scale is 0."""
    scale = np.abs(rows).max(axis=1, initial=0.0) / 127
    return np.rint(rows / np.where(scale == 0, 1, scale)[:, None]), scale


def project(rows: Array, weight: Array, bias: Array, residual: Array | None = None) -> Array:
    """residual + rows W + bias [M, N]: rows [M, K], weight [K, N], bias [N], residual [M, N]."""
    result: Array = rows @ weight + bias
    return result if residual is None else result + residual
