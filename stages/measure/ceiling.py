"""How much work and memory an answer is at least: the floor that every runtime stands on."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from hstu.config import HSTUConfig

_SQUARE = np.ones((96, 96), np.float32)
FIXED_PRODUCTS = 32  # about a millisecond


def answer_flops(config: HSTUConfig, lengths: Sequence[int], *, entry: str, candidates: int) -> float:
    """Floating-point operations that a batch needs at least: THE definition of every share of the ceiling.

    No padding, the causal half of the attention, and of the last layer what the answer depends on. With n events,
    width D, P = 2H(dqk + dv) columns of the fused projection, A = H(dqk + dv) and V = H·dv, a multiply-add counting
    two, element-wise work nothing:

        full layer     2nDP  +  n(n + 1)A  +  2nVD            projection, attention, output
        last layer     2nDA  +  2DA  +  2nA  +  2VD           k and v of all events; q, u, attention, output of one
        retrieve       (layers - 1) full + last + 2D·items
        rank           (layers - 1) full + 2nDA, and for every candidate
                       layers · (2DP + 2(n + 1)A + 2VD) + 2·head_dim·(D + tasks)
    """
    d, h = config.embedding_dim, config.num_heads
    qk, hv = h * config.qk_dim, h * config.v_dim
    total = 0.0
    for length in map(float, lengths):
        project = 2 * length * d * config.uvqk_dim
        attend = length * (length + 1) * (qk + hv)
        full = project + attend + 2 * length * hv * d
        if entry == "retrieve":
            last = 2 * length * d * (qk + hv) + 2 * d * (qk + hv) + 2 * length * (qk + hv) + 2 * hv * d
            total += (config.num_layers - 1) * full + last + 2 * d * config.num_items
        else:
            per_candidate = 2 * d * config.uvqk_dim + 2 * (length + 1) * (qk + hv) + 2 * hv * d
            heads = 2 * config.head_dim * (d + len(config.tasks))
            total += (config.num_layers - 1) * full + 2 * length * d * (qk + hv)
            total += candidates * (config.num_layers * per_candidate + heads)
    return total


def least_memory_mib(config: HSTUConfig, weights_bytes: int, *, batch: int, length: int) -> float:
    """MiB that an answer of `retrieve` needs in fp32: the weights once and the activations of one layer.

    Activations, of 4 bytes each: for every one of batch · length positions the state before and after (2D), the
    fused projection (u, v, q and k of all heads) and the gated attention (H·dv); for every user a score per item.
    Scores of attention are not held: they can be used as they are made.
    """
    positions = 2 * config.embedding_dim + config.uvqk_dim + config.num_heads * config.v_dim
    activations = 4 * (batch * length * positions + batch * config.num_items)
    return (weights_bytes + activations) / 2**20


def calibration_ms() -> float:
    """Milliseconds of a fixed piece of work on one thread: how fast this machine is today.

    512³ fp32 products and a pass over 64 MiB, the fastest of five: compute and memory bandwidth together.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    square = torch.ones(512, 512)
    long = torch.ones(16 * 2**20)
    fastest = float("inf")
    for _ in range(5):
        before = time.perf_counter()
        for _ in range(4):
            torch.mm(square, square)
        long.add_(1.0)
        fastest = min(fastest, time.perf_counter() - before)
    torch.set_num_threads(threads)
    return fastest * 1e3


def fixed_work() -> None:
    """A millisecond of products that stay in a core's own cache: what takes turns with engines, to see the noise."""
    for _ in range(FIXED_PRODUCTS):
        np.matmul(_SQUARE, _SQUARE)
