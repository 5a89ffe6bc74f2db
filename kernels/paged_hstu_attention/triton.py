"""HSTU attention on a paged cache in Triton: decode, extend and the write into the pages.

The cache is vLLM's [pages, H, page_size, dqk + dv] (HND), keys before values; `table` [R, ·] lists a request's pages in
the order of its history; `times` [pages · page_size] are the events' times by slot. There is no softmax, so parts of a
history simply add up, in any split. Rows past a history's end are never read: 0 · NaN would be NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.hstu_attention.triton import attended, half_bias, halved, load_rows, staged_table
from kernels.silu import silu_of_half


@triton.jit
def page_rows(cache, table, j, inside, head, heads, page_size, WIDTH: tl.constexpr):
    """Pointers to the cached rows of events j [N] of a request, and their slots; page 0 where not `inside`."""
    page = tl.load(table + j // page_size, mask=inside, other=0).to(tl.int64)
    return cache + ((page * heads + head) * page_size + j % page_size) * WIDTH, page * page_size + j % page_size


@triton.jit
def load_part(rows, inside, COLUMN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns [COLUMN, COLUMN + D) of rows [N] as [N, BLOCK_D], zero where not `inside`."""
    d = tl.arange(0, BLOCK_D)
    if D == BLOCK_D:
        return tl.load(rows[:, None] + COLUMN + d[None, :], mask=inside[:, None], other=0.0)
    return tl.load(rows[:, None] + COLUMN + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def decode(
    q, cache, out, workspace, table, lengths, times, next_times, position_bias, time_bias, bucket_edges,
    q_row, out_row, table_row, heads, page_size, splits, max_length, scale,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out [R, H·dv] of each request's newest event, or its part in workspace float32 [R, H, splits, dv].

    q [R, H·dqk]; the event itself stands in the pages already, lengths int32 [R] count it. One program per split of the
    history, head and request. Bound by memory: a product with one row needs no matrix unit.
    """
    split, head, request = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + request)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    begin, end = split * share, tl.minimum((split + 1) * share, length)
    dqk, dv = tl.arange(0, BLOCK_DQK), tl.arange(0, BLOCK_DV)
    query = 0.5 * tl.load(q + request * q_row + head * DQK + dqk, mask=dqk < DQK, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    if BIAS:
        time_table, edges = staged_table(time_bias, 0.5), staged_table(bucket_edges, 1.0)
        next_time = tl.load(next_times + request + tl.arange(0, 1))
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        rows, slots = page_rows(
            cache, table + request * table_row, j, j < end, head, heads, page_size, DQK + DV
        )  # fmt: skip
        keys = load_part(rows, j < end, 0, DQK, BLOCK_DQK).to(tl.float32)
        values = load_part(rows, j < end, DQK, DV, BLOCK_DV).to(tl.float32)
        half = tl.sum(keys * query[None, :], 1)
        if BIAS:
            i = length - 1 + tl.arange(0, 1)
            times_j = tl.load(times + slots, mask=j < end, other=0)
            bias = half_bias(
                i, j, length - 1, start, length, next_time, times_j, position_bias, time_table, edges, max_length,
                1, BLOCK_N,
            )  # fmt: skip
            half += bias.reshape(BLOCK_N)
        acc += tl.sum(silu_of_half(half, FAST)[:, None] * values, 0)
    if splits == 1:
        tl.store(
            out + request * out_row + head * DV + dv, (acc * scale).to(out.dtype.element_ty), mask=dv < DV
        )  # fmt: skip
    else:
        tl.store(workspace + ((request * heads + head) * splits + split) * DV + dv, acc, mask=dv < DV)


@triton.jit
def reduce(
    workspace, out, out_row, heads, splits, scale, DV: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """out [R, H·dv] = scale · the sum of workspace float32 [R, H, splits, dv], always in the same order."""
    head, request = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for split in range(splits):
        acc += tl.load(workspace + ((request * heads + head) * splits + split) * DV + dv, mask=dv < DV, other=0.0)
    tl.store(out + request * out_row + head * DV + dv, (acc * scale).to(out.dtype.element_ty), mask=dv < DV)


@triton.jit
def extend(
    q, k, v, cache, out, starts, contexts, num_targets, table, times, row_times, next_times,
    position_bias, time_bias, bucket_edges,
    q_row, k_row, v_row, out_row, table_row, heads, page_size, max_length, scale,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out [T, H·dv] of new rows that see the cached events of their request, and one another as in `attention`.

    Request r's rows stand at [starts[r], starts[r+1]) int32, its first contexts[r] int32 events in the pages; the last
    num_targets[r] int32 rows are candidates: they see the cached events, new events before them, and themselves. The
    new rows' own k and v are read from q's fellows, not from the pages, so candidates never enter the cache.
    row_times, next_times int64 [T]: when each new row happened, and what its successor's time is.
    """
    head, request = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin = tl.load(starts + request).to(tl.int64)
    length = tl.load(starts + request + 1) - begin.to(tl.int32)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first >= length:
        return
    history = length - tl.load(num_targets + request)
    context = tl.load(contexts + request)
    i = first + tl.arange(0, BLOCK_M)
    queries = halved(load_rows(q + begin * q_row + head * DQK, i, q_row, length, True, DQK, BLOCK_DQK))
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if BIAS:
        time_table, edges = staged_table(time_bias, 0.5), staged_table(bucket_edges, 1.0)
        next_i = tl.load(next_times + begin + i, mask=i < length, other=0)
    for start in tl.range(0, context, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        rows, slots = page_rows(
            cache, table + request * table_row, j, j < context, head, heads, page_size, DQK + DV
        )  # fmt: skip
        keys = load_part(rows, j < context, 0, DQK, BLOCK_DQK)
        values = load_part(rows, j < context, DQK, DV, BLOCK_DV)
        half = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if BIAS:
            times_j = tl.load(times + slots, mask=j < context, other=0)
            half += half_bias(
                context + tl.minimum(i, history), j, context + tl.minimum(first, history), start, context + history,
                next_i, times_j, position_bias, time_table, edges, max_length, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        acc = tl.dot(silu_of_half(half, FAST).to(values.dtype), values, acc, input_precision="ieee")
    acc = attended(
        acc, q + begin * q_row + head * DQK, k + begin * k_row + head * DQK, v + begin * v_row + head * DV,
        q_row, k_row, v_row, row_times + begin, next_times + begin, position_bias, time_bias, bucket_edges, max_length,
        first, length, history, DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, BIAS, FAST,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_DV)
    pointers = out + begin * out_row + head * DV + i[:, None] * out_row + d[None, :]
    tl.store(pointers, (acc * scale).to(out.dtype.element_ty), mask=(i < length)[:, None] & (d < DV)[None, :])


@triton.jit
def write_part(
    source, cache, i, row, place, kept, head, COLUMN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows i of source stand in columns [COLUMN, COLUMN + D) of the cache at `place`, where `kept`."""
    d = tl.arange(0, BLOCK_D)
    mask = kept[:, None] & (d < D)[None, :]
    values = tl.load(source + i[:, None] * row + head * D + d[None, :], mask=mask, other=0.0)
    tl.store(cache + place[:, None] + COLUMN + d[None, :], values.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def write(
    k, v, cache, slots, k_row, v_row, num_rows, heads, page_size,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """k and v [T, H·d] stand in the pages at their slots int64 [T]; a row whose slot is negative stands nowhere."""
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(slots + i, mask=i < num_rows, other=-1)
    place = (((slot // page_size) * heads + head) * page_size + slot % page_size) * (DQK + DV)
    write_part(k, cache, i, k_row, place, slot >= 0, head, 0, DQK, BLOCK_DQK)
    write_part(v, cache, i, v_row, place, slot >= 0, head, DQK, DV, BLOCK_DV)
