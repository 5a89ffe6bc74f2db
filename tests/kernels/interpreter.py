"""Runs Triton kernels in its interpreter and holds them against the naive truth in float64.

Run as `TRITON_INTERPRET=1 python -m tests.kernels.interpreter OP`: Triton reads the variable when a kernel is defined,
so this is a process of its own. Prints one JSON line per case: its name, its largest error, and its tolerance.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch
from torch import Tensor

from hstu.time_buckets import THRESHOLDS, time_buckets
from kernels import jit
from kernels.embedding_bag import naive as bag_naive
from kernels.hstu_attention import naive, op
from kernels.hstu_attention import variants as attention_variants
from kernels.interaction import naive as interaction_naive
from kernels.interaction import variants as interaction_variants
from kernels.spec import TOLERANCES, Config, Kernel, Launch, block
from kernels.uvqk_silu import naive as uvqk_naive

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
Case = tuple[str, float, float]  # name, error, tolerance


def error(out: Tensor, truth: np.ndarray) -> float:
    """Largest difference, of the truth's largest value or of 1; infinite where the kernel left poison."""
    difference = np.abs(out.double().numpy().reshape(truth.shape) - truth).max(initial=0)
    return float(np.nan_to_num(difference / max(1.0, np.abs(truth).max(initial=0)), nan=np.inf))


def find(kernels: Iterator[Kernel], name: str) -> Kernel:
    return next(kernel for kernel in kernels if kernel.name == name)


class Jagged:
    """Random users in views of one fused UVQK output, with poison after the last row."""

    def __init__(self, dtype: str, heads: int, width: int, lengths: list[int], targets: list[int], seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.lengths, self.targets, rows = lengths, targets, sum(lengths)
        uvqk = torch.randn((rows + 70, 4 * heads * width), generator=g).to(DTYPES[dtype])
        uvqk[rows:] = float("nan")
        self.u, self.v, self.q, self.k = (
            part[:rows].unflatten(1, (heads, width)) for part in uvqk.split(heads * width, 1)
        )
        self.max_length = max(lengths) + 5
        self.offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
        self.num_targets = torch.tensor(targets, dtype=torch.int64)
        times = [torch.randint(0, 2**44, (rows,), generator=g) >> torch.randint(0, 44, (rows,), generator=g)] * 2
        self.bias = op.RelativeBias(
            position_bias=torch.randn(2 * self.max_length - 1, generator=g),
            time_bias=torch.randn(129, generator=g),
            bucket_edges=op.bucket_edges(THRESHOLDS),
            times=times[0],
            next_times=times[1].roll(-1) + torch.randint(0, 99, (rows,), generator=g),
        )
        self.out = torch.full((rows, heads, width), float("nan"), dtype=DTYPES[dtype])

    def truth(self, biased: bool, gated: bool) -> np.ndarray:
        parts = []
        for user, length in enumerate(self.lengths):
            rows = slice(int(self.offsets[user]), int(self.offsets[user + 1]))
            targets, bias = self.targets[user], 0.0
            if biased:
                buckets = time_buckets(self.bias.next_times[rows, None] - self.bias.times[None, rows]).numpy()
                bias = naive.relative_bias(
                    naive.positions(length, targets), buckets, self.bias.position_bias.double().numpy(),
                    self.bias.time_bias.double().numpy(),
                )  # fmt: skip
            q, k, v, u = (x[rows].double().numpy() for x in (self.q, self.k, self.v, self.u))
            o = naive.attend(q, k, v, bias, max_length=self.max_length, num_targets=targets)
            for i in range(length if gated else 0):
                o[i] = naive.gate(u[i].reshape(-1), o[i], 1e-6).reshape(o[i].shape)
            parts.append(o)
        return np.concatenate(parts)

    def launch(self, *, biased: bool, gated: bool, tma: bool) -> Launch:
        return op.launch(
            self.q, self.k, self.v, self.out, self.offsets, self.num_targets, longest=max(self.lengths),
            max_length=self.max_length, bias=self.bias if biased else None, u=self.u if gated else None, tma=tma,
        )  # fmt: skip


def attention_case(
    dtype: str, lengths: list[int], targets: list[int], *, heads: int = 2, width: int = 16, biased: bool = False,
    gated: bool = False, tma: bool = False, tile: tuple[int, int] = (64, 64), seed: int = 0,
) -> Case:  # fmt: skip
    problem = Jagged(dtype, heads, width, lengths, targets, seed)
    launch = problem.launch(biased=biased, gated=gated, tma=tma)
    entry = "tma" if tma else "gated" if gated else "pointer"
    kernel = attention_variants._kernel(dtype, width, biased, entry)
    config = Config({"BLOCK_M": tile[0], "BLOCK_N": tile[1]}, 4, 1)
    jit.run(kernel, config, launch, {"FAST": False})
    label = f"{kernel.name} lengths {lengths} targets {targets} tile {tile}"
    return label, error(problem.out, problem.truth(biased, gated)), TOLERANCES[dtype]


def padded_case(
    dtype: str, lengths: list[int], *, heads: int = 2, width: int = 16, rows: int = 0, tile: tuple[int, int] = (64, 64)
) -> Case:
    """The kernel of TensorRT's plugin: what stands behind a history is poison, and its answer there is zero."""
    g, users, rows = torch.Generator().manual_seed(len(lengths)), len(lengths), rows or max(lengths)
    max_length = rows + 3
    before = torch.randn((users, rows, 4 * heads * width), generator=g)
    times = torch.randint(0, 2**44, (users, rows), generator=g) >> torch.randint(0, 44, (users, rows), generator=g)
    next_times = times.roll(-1, 1) + torch.randint(0, 99, (users, rows), generator=g)
    position_bias, time_bias = torch.randn(2 * max_length - 1, generator=g), torch.randn(129, generator=g)
    uvqk = torch.nn.functional.silu(before).to(DTYPES[dtype])
    truth = np.zeros((users, rows, heads * width))
    for user, length in enumerate(lengths):
        u, v, q, k = (
            x.double().numpy().reshape(length, heads, width) for x in uvqk[user, :length].split(heads * width, 1)
        )
        buckets = time_buckets(next_times[user, :length, None] - times[user, None, :length]).numpy()
        tables = (position_bias.double().numpy(), time_bias.double().numpy())
        bias = naive.relative_bias(naive.positions(length), np.tril(buckets), *tables)
        o = naive.attend(q, k, v, bias, max_length=max_length)
        for i in range(length):
            truth[user, i] = naive.gate(u[i].reshape(-1), o[i], attention_variants.EPSILON)
        uvqk[user, length:] = float("nan")
    out = torch.full(truth.shape, float("nan"), dtype=uvqk.dtype)
    launch = op.padded_launch(
        uvqk, times, next_times, torch.tensor(lengths), position_bias, time_bias, op.bucket_edges(THRESHOLDS), out,
        heads=heads, max_length=max_length,
    )  # fmt: skip
    kernel = attention_variants.padded(dtype, width)
    jit.run(kernel, Config({"BLOCK_M": tile[0], "BLOCK_N": tile[1]}, 4, 1), launch, {"FAST": False})
    return f"{kernel.name} lengths {lengths} of {rows} tile {tile}", error(out, truth), TOLERANCES[dtype]


def hstu_attention() -> Iterator[Case]:
    for dtype in DTYPES:
        yield padded_case(dtype, [0, 1, 63, 64, 65, 31])
    for tile, width in (((16, 32), 25), ((32, 16), 8)):
        yield padded_case("fp32", [40, 0, 17], width=width, rows=50, tile=tile)
    yield padded_case("fp16", [129], heads=1, width=64, rows=200, tile=(128, 64))
    lengths, targets = [0, 1, 63, 64, 65, 31, 5], [0, 1, 10, 64, 0, 30, 0]
    for dtype, biased, gated in product(DTYPES, (False, True), (False, True)):
        yield attention_case(dtype, lengths, targets, biased=biased, gated=gated)
    for tile in ((16, 64), (64, 16), (32, 32)):
        yield attention_case("fp32", [65, 33, 0], [20, 33, 0], biased=True, gated=True, tile=tile, seed=1)
    yield attention_case("fp32", [511], [100], heads=1, biased=True, tile=(128, 128))
    yield attention_case("fp16", [511, 1], [511, 1], heads=1, gated=True, tile=(128, 128))
    yield attention_case("fp16", [511, 63], [60, 0], heads=1, width=64, tma=True, tile=(128, 128))
    for width in (8, 25, 50):
        yield attention_case("fp32", [65, 1], [3, 0], width=width, biased=True, gated=True)
    for dtype, biased in product(DTYPES, (False, True)):
        yield attention_case(dtype, [40, 0, 65, 64], [0, 0, 30, 64], width=64, biased=biased, tma=dtype == "fp16")


def time_bucket() -> Iterator[Case]:
    """The kernel's buckets at every edge, beside it, and at random, against the model's."""
    from tests.kernels.bucket_kernel import buckets

    edges = torch.tensor(THRESHOLDS, dtype=torch.int64)
    random = torch.randint(0, 2**62, (4096,), generator=torch.Generator().manual_seed(0))
    shifted = random >> torch.randint(0, 62, (4096,), generator=torch.Generator().manual_seed(1))
    special = torch.tensor([0, 1, 2**63 - 1, -(2**63) + 1, 2**24 + 1])
    dt = torch.cat([edges - 1, edges, edges + 1, -edges, torch.arange(3000), shifted, special])
    dt = torch.cat([dt, dt.new_zeros(-len(dt) % 64)]).view(-1, 64)
    dt = torch.cat([dt, dt.new_zeros((block(len(dt)) - len(dt), 64))])
    out = torch.full(dt.shape, -1, dtype=torch.int32)
    buckets[(1,)](dt, op.bucket_edges(THRESHOLDS), out, ROWS=len(dt), COLUMNS=64)
    yield "time_bucket", float((out != time_buckets(dt)).sum()), 0.0


def paged_hstu_attention() -> Iterator[Case]:
    from tests.kernels import paged_cases

    yield from paged_cases.cases(error)


def uvqk_silu() -> Iterator[Case]:
    from kernels.uvqk_silu import op as uvqk_op
    from kernels.uvqk_silu import variants

    g = torch.Generator().manual_seed(0)
    for rows, columns, depth in ((1, 16, 32), (65, 80, 64), (33, 48, 96)):
        config = Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 2}, 4, 1)
        x, weight = torch.randn((rows, depth), generator=g).half(), torch.randn((columns, depth), generator=g).half()
        bias = torch.randn(columns, generator=g)
        out = torch.full((rows, columns), float("nan"), dtype=torch.float16)
        kernel = variants._kernel("fp16", int8=False)
        jit.run(kernel, config, uvqk_op.launch(x, weight, bias, out), {"FAST": False})
        truth = uvqk_naive.uvqk_silu(*(t.double().numpy() for t in (x, weight, bias)))
        yield f"{kernel.name} {rows}x{columns}x{depth}", error(out, truth), TOLERANCES["fp16"]
        x8, w8 = (torch.randint(-127, 128, (n, depth), generator=g, dtype=torch.int8) for n in (rows, columns))
        scales = (torch.rand(rows, generator=g) / 99, torch.rand(columns, generator=g) / 99)
        out = torch.full((rows, columns), float("nan"), dtype=torch.float16)
        kernel = variants._kernel("fp16", int8=True)
        jit.run(kernel, config, uvqk_op.launch(x8, w8, bias, out, scales), {"FAST": False})
        truth = uvqk_naive.uvqk_silu_int8(
            x8.numpy(), w8.numpy(), bias.double().numpy(), *(s.double().numpy() for s in scales)
        )
        yield f"{kernel.name} {rows}x{columns}x{depth}", error(out, truth), TOLERANCES["fp16"]


def interaction() -> Iterator[Case]:
    from kernels.interaction import op as interaction_op

    g = torch.Generator().manual_seed(0)
    for dtype, features, width, with_self in (
        ("fp32", 27, 16, False), ("fp32", 27, 20, True), ("fp16", 2, 16, False), ("fp16", 33, 32, True),
    ):  # fmt: skip
        x = torch.randn((5, features + 1, width), generator=g).to(DTYPES[dtype])[:, :features]
        kernel = interaction_variants.kernel(dtype, features, width, with_self=with_self)
        out = torch.full((5, interaction_variants.num_pairs(features, with_self)), float("nan"), dtype=x.dtype)
        launch = interaction_op.launch(x, out, with_self=with_self)
        jit.run(kernel, Config({"SAMPLES": 2, "STAGES": 1}, 2, 1), launch)
        truth = interaction_naive.interaction(x.double().numpy(), with_self=with_self)
        yield kernel.name, error(out, truth), TOLERANCES[dtype] * (5 if dtype == "fp32" else 1)


def embedding_bag() -> Iterator[Case]:
    from kernels.embedding_bag import op as bag_op
    from kernels.embedding_bag import variants

    g = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        table = torch.randn((50, 128), generator=g).to(DTYPES[dtype])
        ids, offsets = torch.randint(0, 50, (30,), generator=g), torch.tensor([0, 0, 1, 8, 30])
        out = torch.full((4, 128), float("nan"), dtype=table.dtype)
        kernel = find(variants.variants(dtype), variants.name(dtype, 128))
        jit.run(kernel, Config({"BAGS": 3, "STAGES": 1}, 1, 1), bag_op.launch(table, ids, offsets, out))
        truth = bag_naive.embedding_bag(table.double().numpy(), ids.numpy(), offsets.numpy())
        yield kernel.name, error(out, truth), TOLERANCES[dtype]


OPS: dict[str, Callable[[], Iterator[Case]]] = {
    f.__name__: f for f in (hstu_attention, time_bucket, paged_hstu_attention, uvqk_silu, interaction, embedding_bag)
}

if __name__ == "__main__":
    for name, worst, tolerance in OPS[sys.argv[1]]():
        print(json.dumps({"case": name, "error": worst, "tolerance": tolerance}), flush=True)
