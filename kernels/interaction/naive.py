"""The truth about pairwise interaction (DLRM's dot interaction: Naumov et al. 2019)."""

from __future__ import annotations

import numpy as np

from kernels.hstu_attention.naive import Array


def interaction(x: Array, *, with_self: bool) -> Array:
    """x_i · x_j [B, P] for j < i (j <= i with_self) of x [B, F, D], row by row of the lower triangle."""
    i, j = np.tril_indices(x.shape[1], 0 if with_self else -1)
    return np.asarray(np.einsum("bpd,bpd->bp", x[:, i], x[:, j]))
