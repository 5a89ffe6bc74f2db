"""Random problems for every kernel, at any size and on any device: what to launch, what should come out, what it costs.

Everything is drawn anew from a seed, outputs are filled with NaN, and what no kernel may read is NaN too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import eager
from kernels.bench import meta
from kernels.embedding_bag import op as bag_op
from kernels.hstu_attention import op as attention_op
from kernels.hstu_attention.variants import EPSILON
from kernels.interaction import op as interaction_op
from kernels.interaction.variants import num_pairs
from kernels.paged_hstu_attention import op as paged_op
from kernels.spec import Launch
from kernels.uvqk_silu import op as uvqk_op

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The smallest time difference of each bucket (hstu.time_buckets holds the model's own): here any rising edges will do.
EDGES = tuple(max(2, int(1.3512**bucket)) for bucket in range(1, 129))


@dataclass(kw_only=True)
class Problem:
    """launches fill `out`; `truth` computes it in float64 (float32 where that is too large); flops and bytes of one
    run, each input read and each output written once; rivals compute the same, or as many flops, in other ways: those
    named in `same` give `out`, and a text says why one is not to be had."""

    launches: list[Launch]
    out: Tensor
    truth: Callable[[], Tensor]
    flops: float
    bytes: float
    rivals: dict[str, Callable[[], object] | str] = field(default_factory=dict)
    same: tuple[str, ...] = ()


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _nbytes(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def attention(
    device: torch.device, dtype: str, lengths: Sequence[int], heads: int, width: int, *,
    targets: Sequence[int] | None = None, biased: bool = False, entry: str = "pointer", seed: int = 0,
    rivals: bool = False,
) -> Problem:  # fmt: skip
    """Jagged attention on views of a fused UVQK output."""
    g, rows, longest = _generator(seed, device), sum(lengths), max(lengths)
    uvqk = torch.randn((rows + 1, 4 * heads * width), generator=g, device=device).to(DTYPES[dtype])
    uvqk[rows:] = float("nan")
    u, v, q, k = (part[:rows].unflatten(1, (heads, width)) for part in uvqk.split(heads * width, 1))
    max_length = longest + 3
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int64, device=device)
    num_targets = torch.tensor(targets or [0] * len(lengths), dtype=torch.int64, device=device)
    times = torch.randint(0, 2**40, (rows,), generator=g, device=device)
    bias = attention_op.RelativeBias(
        position_bias=torch.randn(2 * max_length - 1, generator=g, device=device),
        time_bias=torch.randn(129, generator=g, device=device),
        bucket_edges=attention_op.bucket_edges(EDGES, device),
        times=times >> torch.randint(0, 40, (rows,), generator=g, device=device),
        next_times=times,
    ) if biased else None  # fmt: skip
    out = torch.full((rows, heads, width), float("nan"), dtype=DTYPES[dtype], device=device)
    launch = attention_op.launch(
        q, k, v, out, offsets, num_targets, longest=longest, max_length=max_length, bias=bias,
        u=u if entry == "gated" else None, tma=entry == "tma",
    )  # fmt: skip

    def truth() -> Tensor:
        o = eager.attention(q.double(), k.double(), v.double(), offsets, num_targets, max_length, bias)
        return eager.gate(u.double(), o, 1e-6) if entry == "gated" else o

    pairs = sum(n * (n + 1) / 2 for n in lengths)
    problem = Problem(
        launches=[launch], out=out, truth=truth, flops=4 * heads * width * pairs,
        bytes=_nbytes(q, k, v, out) + (_nbytes(u) if entry == "gated" else 0),
    )  # fmt: skip
    if rivals and min(lengths) == longest:
        problem.rivals = _dense_rivals(q, k, v, len(lengths), longest, max_length)
        problem.rivals["meta_triton"] = meta.attention(q, k, v, offsets, longest, max_length)
        problem.same = ("meta_triton",)
    return problem


def padded(
    device: torch.device, dtype: str, lengths: Sequence[int], heads: int, width: int, *, seed: int = 0
) -> Problem:  # fmt: skip
    """Gated attention over padded histories, as the plugin calls it: padding is NaN, and its answer zero."""
    g, users, longest = _generator(seed, device), len(lengths), max(lengths) + 7
    max_length = longest + 3
    uvqk = torch.randn((users, longest, 4 * heads * width), generator=g, device=device).to(DTYPES[dtype])
    inside = torch.arange(longest, device=device)[None, :] < torch.tensor(lengths, device=device)[:, None]
    uvqk[~inside] = float("nan")
    times = torch.randint(0, 2**40, (users, longest), generator=g, device=device)
    next_times = torch.randint(0, 2**40, (users, longest), generator=g, device=device)
    bias = attention_op.RelativeBias(
        position_bias=torch.randn(2 * max_length - 1, generator=g, device=device),
        time_bias=torch.randn(129, generator=g, device=device),
        bucket_edges=attention_op.bucket_edges(EDGES, device), times=times[inside], next_times=next_times[inside],
    )  # fmt: skip
    out = torch.full((users, longest, heads * width), float("nan"), dtype=DTYPES[dtype], device=device)
    launch = attention_op.padded_launch(
        uvqk, times, next_times, torch.tensor(lengths, device=device), bias.position_bias, bias.time_bias,
        bias.bucket_edges, out, heads=heads, max_length=max_length,
    )  # fmt: skip

    def truth() -> Tensor:
        u, v, q, k = (x.unflatten(1, (heads, width)) for x in uvqk[inside].double().split(heads * width, 1))
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
        no_targets = torch.zeros(users, dtype=torch.int64, device=device)
        answer = torch.zeros(out.shape, dtype=torch.float64, device=device)
        gated = eager.gate(u, eager.attention(q, k, v, offsets, no_targets, max_length, bias), EPSILON)
        answer[inside] = gated.flatten(1)
        return answer

    pairs = sum(n * (n + 1) / 2 for n in lengths)
    return Problem(launches=[launch], out=out, truth=truth, flops=4 * heads * width * pairs, bytes=_nbytes(uvqk, out))


def _dense_rivals(
    q: Tensor, k: Tensor, v: Tensor, users: int, length: int, max_length: int
) -> dict[str, Callable[[], object] | str]:
    dense = [x.reshape(users, length, *x.shape[1:]).transpose(1, 2).contiguous() for x in (q, k, v)]
    mask = torch.ones((length, length), dtype=torch.bool, device=q.device).tril()

    def pointwise(q_: Tensor, k_: Tensor, v_: Tensor) -> Tensor:
        weights = torch.nn.functional.silu(q_ @ k_.transpose(2, 3)) * (mask.to(q_.dtype) / max_length)
        return weights @ v_

    compiled = torch.compile(pointwise)
    return {
        "eager": lambda: pointwise(*dense),
        "torch_compile": lambda: compiled(*dense),
        "sdpa_causal_same_flops": lambda: torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=True),
    }


class _Pages:
    """Requests' cached events in pages in random order, with NaN wherever nothing stands."""

    def __init__(
        self, g: torch.Generator, dtype: str, lengths: Sequence[int], heads: int, width: int, page: int
    ) -> None:
        device = g.device
        counts = [-(-n // page) + 1 for n in lengths]
        order = torch.randperm(sum(counts), generator=g, device=device).to(torch.int32)
        self.cache = torch.randn((len(order), heads, page, 2 * width), generator=g, device=device).to(DTYPES[dtype])
        self.table = torch.zeros((len(lengths), max(counts)), dtype=torch.int32, device=device)
        self.times = torch.randint(0, 2**40, (len(order) * page,), generator=g, device=device)
        first, slots = 0, []
        for request, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            self.table[request, :count] = order[first : first + count]
            first += count
            j = torch.arange(length, device=device)
            slots.append(self.table[request].long()[j // page] * page + j % page)
            edge = self.table[request].long()[length // page]
            self.cache[edge, :, length % page :] = float("nan")
            if length // page + 1 < count:
                self.cache[self.table[request].long()[length // page + 1]] = float("nan")
        self.slots = torch.cat(slots)


def decode(
    device: torch.device, dtype: str, lengths: Sequence[int], heads: int, width: int, *, page: int = 16,
    biased: bool = False, splits: int | None = None, num_sms: int = 132, seed: int = 0,
) -> Problem:  # fmt: skip
    """One new event a request over its pages."""
    g = _generator(seed, device)
    pages, requests, longest = _Pages(g, dtype, lengths, heads, width, page), len(lengths), max(lengths)
    q = torch.randn((requests, heads, width), generator=g, device=device).to(DTYPES[dtype])
    out, max_length = torch.full_like(q, float("nan")), longest + 3
    seen = torch.tensor(lengths, dtype=torch.int32, device=device)
    splits = splits or paged_op.num_splits(requests, heads, longest, num_sms)
    workspace = torch.full((requests, heads, splits, width), float("nan"), device=device) if splits > 1 else None
    bias = paged_op.PagedBias(
        position_bias=torch.randn(2 * max_length - 1, generator=g, device=device),
        time_bias=torch.randn(129, generator=g, device=device),
        bucket_edges=attention_op.bucket_edges(EDGES, device), times=pages.times,
        next_times=torch.randint(0, 2**40, (requests,), generator=g, device=device),
    ) if biased else None  # fmt: skip
    launches = paged_op.decode(
        q, pages.cache, out, pages.table, seen, longest=longest, max_length=max_length, bias=bias, splits=splits,
        workspace=workspace,
    )  # fmt: skip
    return Problem(
        launches=launches, out=out,
        truth=lambda: eager.decode(q.double(), pages.cache.double(), pages.table, seen, max_length, bias),
        flops=4.0 * heads * width * sum(lengths),
        bytes=2.0 * heads * width * sum(lengths) * q.element_size() + _nbytes(q, out),
    )  # fmt: skip


def extend(
    device: torch.device, dtype: str, contexts: Sequence[int], new: Sequence[int], targets: Sequence[int], heads: int,
    width: int, *, page: int = 16, biased: bool = False, seed: int = 0,
) -> Problem:  # fmt: skip
    """New rows, the last of them candidates, over cached events."""
    g, rows = _generator(seed, device), sum(new)
    pages = _Pages(g, dtype, contexts, heads, width, page)
    uvqk = torch.randn((rows + 1, 4 * heads * width), generator=g, device=device).to(DTYPES[dtype])
    uvqk[rows:] = float("nan")
    _, v, q, k = (part[:rows].unflatten(1, (heads, width)) for part in uvqk.split(heads * width, 1))
    out = torch.full((rows, heads, width), float("nan"), dtype=DTYPES[dtype], device=device)
    starts, context, num_targets = (
        torch.tensor(values, dtype=torch.int32, device=device)
        for values in ([0, *torch.tensor(new).cumsum(0).tolist()], list(contexts), list(targets))
    )
    max_length = max(c + n for c, n in zip(contexts, new, strict=True)) + 3
    bias = paged_op.PagedBias(
        position_bias=torch.randn(2 * max_length - 1, generator=g, device=device),
        time_bias=torch.randn(129, generator=g, device=device),
        bucket_edges=attention_op.bucket_edges(EDGES, device), times=pages.times,
        next_times=torch.randint(0, 2**40, (rows,), generator=g, device=device),
        row_times=torch.randint(0, 2**40, (rows,), generator=g, device=device),
    ) if biased else None  # fmt: skip
    launch = paged_op.extend(
        q, k, v, pages.cache, out, starts, context, num_targets, pages.table, longest=max(new), max_length=max_length,
        bias=bias,
    )  # fmt: skip
    pairs = sum(
        n * c + (n - t) * (n - t + 1) / 2 + t * (n - t + 1) for c, n, t in zip(contexts, new, targets, strict=True)
    )
    return Problem(
        launches=[launch], out=out,
        truth=lambda: eager.extend(
            q.double(), k.double(), v.double(), pages.cache.double(), starts, context, num_targets, pages.table,
            max_length, bias,
        ),
        flops=4 * heads * width * pairs,
        bytes=_nbytes(q, k, v, out) + 2.0 * heads * width * sum(contexts) * q.element_size(),
    )  # fmt: skip


def write(
    device: torch.device, dtype: str, rows: int, heads: int, width: int, *, page: int = 16, seed: int = 0
) -> Problem:  # fmt: skip
    """Rows into pages, every seventh dropped."""
    g = _generator(seed, device)
    k, v = (torch.randn((rows, heads, width), generator=g, device=device).to(DTYPES[dtype]) for _ in range(2))
    pages = -(-rows // page) + 1
    slots = torch.randperm(pages * page, generator=g, device=device)[:rows]
    slots[::7] = -1
    cache = torch.full((pages, heads, page, 2 * width), 7.0, dtype=DTYPES[dtype], device=device)

    def truth() -> Tensor:
        wanted = torch.full_like(cache, 7.0)
        eager.write(k, v, wanted, slots)
        return wanted.double()

    return Problem(
        launches=[paged_op.write(k, v, cache, slots)], out=cache, truth=truth, flops=0.0, bytes=2 * _nbytes(k, v)
    )


def uvqk_silu(
    device: torch.device, dtype: str, rows: int, columns: int, depth: int, *, int8: bool = False, seed: int = 0,
    rivals: bool = False,
) -> Problem:  # fmt: skip
    """The fused projection."""
    g = _generator(seed, device)
    bias = torch.randn(columns, generator=g, device=device)
    out = torch.full((rows, columns), float("nan"), dtype=DTYPES[dtype], device=device)
    if int8:
        x, weight = (
            torch.randint(-127, 128, (n, depth), generator=g, device=device, dtype=torch.int8) for n in (rows, columns)
        )
        scales = tuple(torch.rand(n, generator=g, device=device) / (73 * depth**0.25) for n in (rows, columns))
        launch = uvqk_op.launch(x, weight, bias, out, (scales[0], scales[1]))
        problem = Problem(
            launches=[launch], out=out, flops=2.0 * rows * columns * depth, bytes=_nbytes(x, weight, out),
            truth=lambda: eager.uvqk_silu_int8(x, weight, bias, (scales[0], scales[1]), torch.float64),
        )  # fmt: skip
        if rivals:
            problem.rivals = {"torch_int_mm_alone": lambda: torch._int_mm(x, weight.T)}
        return problem
    x = torch.randn((rows, depth), generator=g, device=device).to(DTYPES[dtype])
    weight = (torch.randn((columns, depth), generator=g, device=device) / depth**0.5).to(DTYPES[dtype])
    problem = Problem(
        launches=[uvqk_op.launch(x, weight, bias, out)], out=out, flops=2.0 * rows * columns * depth,
        bytes=_nbytes(x, weight, out), truth=lambda: eager.uvqk_silu(x.double(), weight.double(), bias),
    )  # fmt: skip
    if rivals:
        compiled = torch.compile(eager.uvqk_silu)
        problem.rivals = {
            "eager": lambda: eager.uvqk_silu(x, weight, bias), "torch_compile": lambda: compiled(x, weight, bias),
            "matmul_alone": lambda: x @ weight.T,
        }  # fmt: skip
    return problem


def interaction(
    device: torch.device, dtype: str, samples: int, features: int, width: int, *, with_self: bool = False,
    seed: int = 0, rivals: bool = False,
) -> Problem:  # fmt: skip
    """Pairwise products, packed."""
    x = torch.randn((samples, features, width), generator=_generator(seed, device), device=device).to(DTYPES[dtype])
    out = torch.full((samples, num_pairs(features, with_self)), float("nan"), dtype=DTYPES[dtype], device=device)
    problem = Problem(
        launches=[interaction_op.launch(x, out, with_self=with_self)], out=out,
        truth=lambda: eager.interaction(x.double(), with_self),
        flops=2.0 * samples * width * num_pairs(features, with_self), bytes=_nbytes(x, out),
    )  # fmt: skip
    if rivals:
        compiled = torch.compile(eager.interaction)
        problem.rivals = {
            "eager": lambda: eager.interaction(x, with_self), "torch_compile": lambda: compiled(x, with_self)
        }  # fmt: skip
    return problem


def embedding_bag(
    device: torch.device, dtype: str, rows: int, bags: int, per_bag: int, width: int, *, seed: int = 0,
    rivals: bool = False,
) -> Problem:  # fmt: skip
    """Gather and sum; the first bag is empty."""
    g = _generator(seed, device)
    table = torch.randn((rows, width), generator=g, device=device).to(DTYPES[dtype])
    ids = torch.randint(0, rows, ((bags - 1) * per_bag,), generator=g, device=device)
    offsets = torch.cat([ids.new_zeros(1), torch.arange(bags, device=device) * per_bag])
    out = torch.full((bags, width), float("nan"), dtype=DTYPES[dtype], device=device)
    problem = Problem(
        launches=[bag_op.launch(table, ids, offsets, out)], out=out,
        truth=lambda: eager.embedding_bag(table.double(), ids, offsets), flops=float(len(ids) * width),
        bytes=len(ids) * width * table.element_size() + _nbytes(out),
    )  # fmt: skip
    if rivals:
        problem.rivals = {"torch_embedding_bag": lambda: eager.embedding_bag(table, ids, offsets)}
    return problem
