"""How much work an answer is, and how fast this machine multiplies matrices: the roof over every engine."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hstu.config import HSTUConfig

GEMM_SECONDS = 0.12  # per matrix size, and
GEMM_TIMES = 8  # at least, of which the fastest counts
INT8 = "int8"


def answer_flops(config: HSTUConfig, lengths: Sequence[int], *, entry: str, candidates: int) -> float:
    """Floating-point operations that a batch needs at least: no padding, causal half of the attention.

    For `retrieve` the last layer computes keys and values of every event but queries, gate and output of the
    last one only. A multiply-add counts two. Element-wise work is not counted.
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


def gemm_gflops(config: HSTUConfig, rows: int, precision: str) -> float | None:
    """The best rate of this model's two matrix products in PyTorch (oneDNN, MKL) at `rows` rows, in GFLOP/s.

    None for a precision whose product PyTorch has no fast form of on a CPU.
    """
    import torch

    # fp16 is left out: CPUs without AVX512-FP16 emulate it at a hundredth of their fp32 rate
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, INT8: torch.int8}
    if precision not in dtypes:
        return None
    best = 0.0
    shapes = ((config.embedding_dim, config.uvqk_dim), (config.num_heads * config.v_dim, config.embedding_dim))
    for inner, columns in shapes:
        if precision == INT8:
            left = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
            right = torch.randint(-127, 128, (inner, columns), dtype=torch.int8)
            multiply = torch._int_mm
        else:
            left = torch.randn(rows, inner).to(dtypes[precision])
            right = torch.randn(inner, columns).to(dtypes[precision])
            multiply = torch.mm
        multiply(left, right)
        fastest, started, done = float("inf"), time.perf_counter(), 0
        while done < GEMM_TIMES or time.perf_counter() - started < GEMM_SECONDS:
            done += 1
            before = time.perf_counter()
            multiply(left, right)
            fastest = min(fastest, time.perf_counter() - before)
        best = max(best, 2.0 * rows * inner * columns / fastest / 1e9)
    return best


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
