"""Cases of the paged kernels for the interpreter: pages in random order, poison wherever no answer may look."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from hstu.time_buckets import THRESHOLDS, time_buckets
from kernels import jit
from kernels.hstu_attention import naive
from kernels.hstu_attention.op import bucket_edges
from kernels.paged_hstu_attention import op, variants
from kernels.spec import TOLERANCES, Config, Kernel, Launch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
Error = Callable[[Tensor, np.ndarray], float]


def kernel(function: str, dtype: str, width: int, biased: bool = False) -> Kernel:
    wanted = variants.name(function, dtype, width, bias=biased)
    return next(one for one in variants.variants(dtype, width) if one.name == wanted)


class Paged:
    """Requests of context + new events (the last `targets` of them candidates); the cache holds the contexts."""

    def __init__(
        self, dtype: str, heads: int, width: int, page: int, contexts: list[int], new: list[int], targets: list[int]
    ) -> None:
        g = torch.Generator().manual_seed(7)
        self.dtype, self.heads, self.width, self.page = dtype, heads, width, page
        self.contexts, self.new, self.targets = contexts, new, targets
        totals = [c + n for c, n in zip(contexts, new, strict=True)]
        self.max_length = max(totals) + 3
        self.events = [
            torch.randn((n, 4, heads, width), generator=g).to(DTYPES[dtype]) for n in totals
        ]  # u, v, q, k of each
        self.times = [
            torch.randint(0, 2**40, (n,), generator=g) >> torch.randint(0, 40, (n,), generator=g) for n in totals
        ]
        self.next_times = [t.roll(-1) + 17 for t in self.times]
        num_pages = [-(-c // page) + 1 for c in contexts]
        order = torch.randperm(sum(num_pages) + 2, generator=g).to(torch.int32)
        self.cache = torch.full((len(order), heads, page, 2 * width), float("nan"), dtype=DTYPES[dtype])
        self.slot_times = torch.full((len(order) * page,), 2**60)
        self.table = torch.full((len(contexts), max(num_pages) + 1), 2**30, dtype=torch.int32)
        first = 0
        slots, rows = [], []
        for request, (context, count) in enumerate(zip(contexts, num_pages, strict=True)):
            self.table[request, :count] = order[first : first + count]
            first += count
            j = torch.arange(context)
            slots.append(self.table[request][j // page].long() * page + j % page)
            rows.append(self.events[request][:context])
            self.slot_times[slots[-1]] = self.times[request][:context]
        self.slots, self.rows = torch.cat(slots), torch.cat(rows)
        self.position_bias = torch.randn(2 * self.max_length - 1, generator=g)
        self.time_bias = torch.randn(129, generator=g)

    def write(self) -> None:
        """The cache filled by the kernel, with rows to drop among the others."""
        dropped = torch.cat([self.slots, torch.tensor([-1, -5])])
        rows = torch.cat([self.rows, torch.full_like(self.rows[:1], float("nan")).expand(2, -1, -1, -1)])
        launch = op.write(rows[:, 3], rows[:, 1], self.cache, dropped)
        jit.run(kernel("write", self.dtype, self.width), Config({"BLOCK_M": 16}, 1, 1), launch)

    def bias(self, next_times: Tensor, row_times: Tensor | None) -> op.PagedBias:
        return op.PagedBias(
            position_bias=self.position_bias, time_bias=self.time_bias, bucket_edges=bucket_edges(THRESHOLDS),
            times=self.slot_times, next_times=next_times, row_times=row_times,
        )  # fmt: skip

    def truth(self, biased: bool) -> list[np.ndarray]:
        parts = []
        for request, events in enumerate(self.events):
            bias, targets = 0.0, self.targets[request]
            if biased:
                buckets = time_buckets(self.next_times[request][:, None] - self.times[request]).numpy()
                bias = naive.relative_bias(
                    naive.positions(len(events), targets), buckets, self.position_bias.double().numpy(),
                    self.time_bias.double().numpy(),
                )  # fmt: skip
            _, v, q, k = events.double().numpy().transpose(1, 0, 2, 3)
            parts.append(naive.attend(q, k, v, bias, max_length=self.max_length, num_targets=targets))
        return parts

    def new_rows(self) -> Tensor:
        return torch.cat([e[c:] for e, c in zip(self.events, self.contexts, strict=True)])


def decode_case(
    error: Error, dtype: str, biased: bool, splits: int, width: int = 16, page: int = 16
) -> tuple[str, float, float]:
    lengths = [1, 15, 16, 17, 63, 64, 65, 200]
    paged = Paged(dtype, 2, width, page, lengths, [0] * len(lengths), [0] * len(lengths))
    paged.write()
    q = torch.stack([events[-1, 2] for events in paged.events])
    out = torch.full_like(q, float("nan"))
    workspace = torch.full((len(q), 2, splits, width), float("nan")) if splits > 1 else None
    bias = paged.bias(torch.stack([t[-1] for t in paged.next_times]), None) if biased else None
    launches = op.decode(
        q, paged.cache, out, paged.table, torch.tensor(lengths, dtype=torch.int32), longest=200,
        max_length=paged.max_length, bias=bias, splits=splits, workspace=workspace,
    )  # fmt: skip
    config = Config({"BLOCK_N": 16, "STAGES": 1}, 1, 1)
    run(kernel("decode", dtype, width, biased), config, launches[0])
    if splits > 1:
        run(kernel("reduce", dtype, width), Config({}, 1, 1), launches[1])
    truth = np.stack([part[-1] for part in paged.truth(biased)])
    return f"{launches[0].kernel} page {page} splits {splits}", error(out, truth), TOLERANCES[dtype]


def run(one: Kernel, config: Config, launch: Launch) -> None:
    jit.run(one, config, launch, {"FAST": False} if "FAST" in one.constants else None)


def extend_case(error: Error, dtype: str, biased: bool, width: int = 16) -> tuple[str, float, float]:
    contexts, new, targets = [0, 1, 15, 16, 17, 65, 40], [20, 1, 17, 16, 1, 33, 0], [0, 1, 10, 16, 0, 5, 0]
    paged = Paged(dtype, 2, width, 16, contexts, new, targets)
    paged.write()
    rows = paged.new_rows()
    out = torch.full((len(rows), 2, width), float("nan"), dtype=DTYPES[dtype])
    split = [torch.cat([t[c:] for t, c in zip(x, contexts, strict=True)]) for x in (paged.next_times, paged.times)]
    launch = op.extend(
        rows[:, 2], rows[:, 3], rows[:, 1], paged.cache, out, torch.tensor([0, *np.cumsum(new)], dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32), torch.tensor(targets, dtype=torch.int32), paged.table,
        longest=max(new), max_length=paged.max_length, bias=paged.bias(*split) if biased else None,
    )  # fmt: skip
    run(kernel("extend", dtype, width, biased), Config({"BLOCK_M": 16, "BLOCK_N": 32}, 1, 1), launch)
    truth = np.concatenate([part[c:] for part, c in zip(paged.truth(biased), contexts, strict=True)])
    return launch.kernel, error(out, truth), TOLERANCES[dtype]


def cases(error: Error) -> Iterator[tuple[str, float, float]]:
    for dtype in DTYPES:
        for biased in (False, True):
            for splits in (1, 3):
                yield decode_case(error, dtype, biased, splits)
            yield extend_case(error, dtype, biased)
    yield decode_case(error, "fp32", True, 5, width=25, page=10)
    yield extend_case(error, "fp32", True, width=25)
