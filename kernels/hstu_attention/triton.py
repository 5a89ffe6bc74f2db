"""HSTU attention on jagged rows in Triton: causal, with targets, relative bias and a gated epilogue.

    o_i = Σ_j SiLU(q_i · k_j + bias_ij) v_j / N over j <= i, of the targets only over j = i
    out = o, or u ⊙ LN(o) over all heads when GATED

`naive.py` is the truth. Rows of user b stand at [offsets[b], offsets[b+1]); the last num_targets[b] of them are
targets. A row's heads lie side by side, rows `*_row` elements apart: views into the fused UVQK output go as they are.

Float32 products are exact (input_precision "ieee"), never tf32: the fp32 kernel is there to be compared with.
Scores are computed halved (q is scaled by 1/2 once), because SiLU wants half of them. Bias tables are staged: of the
position table only the BLOCK_M + BLOCK_N values that a tile can ask for, and the 129 values of the time table, are read
once a tile and gathered from on chip.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.silu import silu_of_half

NUM_BUCKETS = tl.constexpr(129)
TABLE = tl.constexpr(256)  # the next power of two: what a staged time table holds


@triton.jit
def gathered(table, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """table[index] for index int32 [ROWS, COLUMNS] into a table that is on chip."""
    return tl.gather(table, index.reshape(ROWS * COLUMNS), 0).reshape(ROWS, COLUMNS)


@triton.jit
def time_bucket(dt, edges, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bucket int32 0..128 of each time difference int64 [ROWS, COLUMNS]; edges float32 [256], as `edges_of`.

    Meta's ⌊ln(max(1, |dt|)) / 0.301⌋ in float32, exactly and without a logarithm: a float's bits are its log2 between
    powers of two drawn as straight lines, which lie at most 0.2 buckets too low. So the guess is the bucket or the one
    below it, and one comparison with the bucket's edge tells which.
    """
    magnitude = tl.maximum(tl.abs(dt).to(tl.float32), 1.0)
    line = (magnitude.to(tl.int32, bitcast=True) - 0x3F800000) >> 12  # log2, in units of 2⁻¹¹
    guess = tl.minimum((line * 9432) >> 23, 128)  # 9432 / 2¹² = ln 2 / 0.301, rounded down
    return guess + (magnitude >= gathered(edges, guess, ROWS, COLUMNS)).to(tl.int32)


@triton.jit
def half_bias(
    i, j, first_i, first_j, history, next_i, times_j, position_bias, time_table, edges, max_length,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Half the bias float32 [ROWS, COLUMNS] of rows i [ROWS] that see rows j [COLUMNS] of one user.

    Rows are counted from the user's first; targets stand at `history`. times int64; time_table is halved already.
    """
    SPAN: tl.constexpr = triton.next_power_of_2(ROWS + COLUMNS)
    lowest = tl.minimum(first_j, history) - tl.minimum(first_i + ROWS - 1, history)
    distance = tl.minimum(j, history)[None, :] - tl.minimum(i, history)[:, None]
    entry = tl.minimum(tl.maximum(lowest + tl.arange(0, SPAN) + max_length - 1, 0), 2 * max_length - 2)
    staged = 0.5 * tl.load(position_bias + entry)
    near = tl.minimum(tl.maximum(distance - lowest, 0), SPAN - 1)
    buckets = time_bucket(next_i[:, None] - times_j[None, :], edges, ROWS, COLUMNS)
    return gathered(staged, near, ROWS, COLUMNS) + gathered(time_table, buckets, ROWS, COLUMNS)


@triton.jit
def staged_table(pointer, scale):
    """The 129 values of a table, times scale, in a tensor of 256."""
    entry = tl.arange(0, TABLE)
    return scale * tl.load(pointer + entry, mask=entry < NUM_BUCKETS, other=0.0)


@triton.jit
def load_rows(pointer, rows, row_stride, limit, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [len(rows), BLOCK_D]; what lies beyond D, and with MASKED rows from `limit` on, is zero and not read."""
    d = tl.arange(0, BLOCK_D)
    pointers = pointer + rows[:, None] * row_stride + d[None, :]
    if MASKED:
        if D == BLOCK_D:
            return tl.load(pointers, mask=(rows < limit)[:, None], other=0.0)
        return tl.load(pointers, mask=(rows < limit)[:, None] & (d < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@triton.jit
def load_tile(
    x, rows, start, column, row_stride, limit, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """As `load_rows`; with TMA x is a tensor map, whose box at [start, column] may hold the next user's rows too."""
    if TMA:  # noqa: SIM108 (two types: only one branch is compiled)
        loaded = x.load([start, column])
    else:
        loaded = load_rows(x, rows, row_stride, limit, MASKED, D, BLOCK_D)
    return loaded


@triton.jit
def halved(q):
    """q / 2 in its own type, which is exact but for subnormal numbers."""
    return (q.to(tl.float32) * 0.5).to(q.dtype)


@triton.jit
def weighted(acc, q, k, v, bias, seen, MASKED: tl.constexpr, FAST: tl.constexpr):
    """acc + SiLU(2·(q·kᵀ + bias)) v: q [M, dqk] halved, k [N, dqk], v [N, dv], seen bool [M, N] or None."""
    half = tl.dot(q, tl.trans(k), input_precision="ieee") + bias
    weights = silu_of_half(half, FAST)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    return tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")


@triton.jit
def attended(
    acc, q, k, v, q_row, k_row, v_row, times, next_times, position_bias, time_bias, bucket_edges, max_length,
    first, length, history,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
    begin=0, qk_column=0, v_column=0, TMA: tl.constexpr = False,
):  # fmt: skip
    """acc + Σ_j SiLU(..) v_j float32 [BLOCK_M, BLOCK_DV] of rows [first, first + BLOCK_M) of a user, for one head.

    q, k, v, times and next_times point at the user's first row (and at the head). With TMA q, k and v are tensor maps
    of all rows, in which the user begins at row `begin` and the head at the columns named.
    """
    i = first + tl.arange(0, BLOCK_M)
    queries = halved(load_tile(q, i, begin + first, qk_column, q_row, length, True, DQK, BLOCK_DQK, TMA))
    if BIAS:
        time_table, edges = staged_table(time_bias, 0.5), staged_table(bucket_edges, 1.0)
        next_i = tl.load(next_times + i, mask=i < length, other=0)
    whole = tl.minimum(first, history) // BLOCK_N * BLOCK_N  # every row of this block sees every row before this
    for start in tl.range(0, whole, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        keys = load_tile(k, j, begin + start, qk_column, k_row, length, False, DQK, BLOCK_DQK, TMA)
        values = load_tile(v, j, begin + start, v_column, v_row, length, False, DV, BLOCK_DV, TMA)
        bias = 0.0
        if BIAS:
            bias = half_bias(
                i, j, first, start, history, next_i, tl.load(times + j), position_bias, time_table, edges, max_length,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        acc = weighted(acc, queries, keys, values, bias, None, False, FAST)
    # What is left is masked: the end of the history, and the tiles on the diagonal where targets see themselves.
    last = tl.minimum(first + BLOCK_M, length)
    near = tl.cdiv(tl.minimum(last, history) - whole, BLOCK_N)
    diagonal = tl.maximum(first // BLOCK_N * BLOCK_N, whole + near * BLOCK_N)
    own = tl.where(last > history, tl.maximum(tl.cdiv(last - diagonal, BLOCK_N), 0), 0)
    for step in tl.range(0, near + own):
        start = tl.where(step < near, whole + step * BLOCK_N, diagonal + (step - near) * BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        keys = load_tile(k, j, begin + start, qk_column, k_row, length, True, DQK, BLOCK_DQK, TMA)
        values = load_tile(v, j, begin + start, v_column, v_row, length, True, DV, BLOCK_DV, TMA)
        if TMA:  # the next user's rows could hold NaN, which no weight of zero undoes
            values = tl.where((j < length)[:, None], values, 0.0).to(values.dtype)
        bias = 0.0
        if BIAS:
            times_j = tl.load(times + j, mask=j < length, other=0)
            bias = half_bias(
                i, j, first, start, history, next_i, times_j, position_bias, time_table, edges, max_length,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        same = j[None, :] == i[:, None]
        seen = same | ((j[None, :] < i[:, None]) & (j < history)[None, :])
        if TMA:  # changes no row that is stored; without it the code takes more registers
            seen = seen & (j < length)[None, :]
        acc = weighted(acc, queries, keys, values, bias, seen, True, FAST)
    return acc


@triton.jit
def attention(
    q, k, v, out, offsets, num_targets, times, next_times, position_bias, time_bias, bucket_edges,
    q_row, k_row, v_row, out_row, max_length, scale,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out [T, H·DV] = o: one program per block of rows (the longest first), head and user."""
    head, user = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = tl.load(offsets + user)
    length = (tl.load(offsets + user + 1) - begin).to(tl.int32)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first >= length:
        return
    history = length - tl.load(num_targets + user).to(tl.int32)
    acc = attended(
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
        q + begin * q_row + head * DQK, k + begin * k_row + head * DQK, v + begin * v_row + head * DV,
        q_row, k_row, v_row, times + begin, next_times + begin, position_bias, time_bias, bucket_edges, max_length,
        first, length, history, DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, BIAS, FAST,
    )  # fmt: skip
    i, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    pointers = out + begin * out_row + head * DV + i[:, None] * out_row + d[None, :]
    tl.store(pointers, (acc * scale).to(out.dtype.element_ty), mask=(i < length)[:, None] & (d < DV)[None, :])


@triton.jit
def attention_tma(
    q, k, v, out, offsets, num_targets, times, next_times, position_bias, time_bias, bucket_edges,
    q_row, k_row, v_row, out_row, max_length, scale,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """As `attention`, with q, k and v as tensor maps over [T, H·d] whose boxes are [BLOCK, d]: for sm_90 and newer.

    A box may reach into the next user's rows: such rows of v become zero in registers, in the masked tiles alone.
    """
    head, user = tl.program_id(1), tl.program_id(2)
    begin = tl.load(offsets + user).to(tl.int32)
    length = tl.load(offsets + user + 1).to(tl.int32) - begin
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first >= length:
        return
    history = length - tl.load(num_targets + user).to(tl.int32)
    acc = attended(
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), q, k, v, q_row, k_row, v_row, times + begin, next_times + begin,
        position_bias, time_bias, bucket_edges, max_length, first, length, history, DQK, DV, BLOCK_DQK, BLOCK_DV,
        BLOCK_M, BLOCK_N, BIAS, FAST, begin, head * DQK, head * DV, True,
    )  # fmt: skip
    i, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    pointers = out + begin.to(tl.int64) * out_row + head * DV + i[:, None] * out_row + d[None, :]
    tl.store(pointers, (acc * scale).to(out.dtype.element_ty), mask=(i < length)[:, None] & (d < DV)[None, :])


@triton.jit
def gated_rows(
    q, k, v, u, out, q_row, k_row, v_row, u_row, out_row, times, next_times, position_bias, time_bias, bucket_edges,
    max_length, scale, epsilon, heads, first, length, history,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out = u ⊙ LN(o) in rows [first, first + BLOCK_M) of one user, whose first row all pointers point at.

    The heads' o go to `out` first and are read back, from the nearest cache, once mean and variance over all of them
    are known. Mean and sum of squared deviations are merged head by head (Chan, Golub & LeVeque 1979): no difference
    of large numbers.
    """
    i, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    inside, real = (i < length)[:, None] & (d < DV)[None, :], (d < DV)[None, :]
    pointers = out + i[:, None] * out_row + d[None, :]
    mean, deviations = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for head in range(heads):
        acc = attended(
            tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), q + head * DQK, k + head * DQK, v + head * DV, q_row, k_row,
            v_row, times, next_times, position_bias, time_bias, bucket_edges, max_length, first, length, history,
            DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, BIAS, FAST,
        )  # fmt: skip
        o = (acc * scale).to(out.dtype.element_ty)
        tl.store(pointers + head * DV, o, mask=inside)
        o = tl.where(real, o.to(tl.float32), 0.0)
        mean_here = tl.sum(o, 1) / DV
        apart = tl.where(real, o - mean_here[:, None], 0.0)
        shift = mean_here - mean
        mean += shift / (head + 1)
        deviations += tl.sum(apart * apart, 1) + shift * shift * (DV * head / (head + 1))
    tl.debug_barrier()  # what other threads of this program stored is there to be read
    factor = 1 / tl.sqrt(deviations / (heads * DV) + epsilon)
    u_pointers = u + i[:, None] * u_row + d[None, :]
    for head in range(heads):
        o = tl.load(pointers + head * DV, mask=inside, other=0.0).to(tl.float32)
        gates = tl.load(u_pointers + head * DV, mask=inside, other=0.0).to(tl.float32)
        gated = gates * (o - mean[:, None]) * factor[:, None]
        tl.store(pointers + head * DV, gated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_attention(
    q, k, v, u, out, offsets, num_targets, times, next_times, position_bias, time_bias, bucket_edges,
    q_row, k_row, v_row, u_row, out_row, max_length, scale, epsilon, heads,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out [T, H·DV] = u ⊙ LN(o): one program per block of rows and user, which goes through the heads."""
    user = tl.program_id(1)
    begin = tl.load(offsets + user)
    length = (tl.load(offsets + user + 1) - begin).to(tl.int32)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first >= length:
        return
    history = length - tl.load(num_targets + user).to(tl.int32)
    gated_rows(
        q + begin * q_row, k + begin * k_row, v + begin * v_row, u + begin * u_row, out + begin * out_row,
        q_row, k_row, v_row, u_row, out_row, times + begin, next_times + begin, position_bias, time_bias, bucket_edges,
        max_length, scale, epsilon, heads, first, length, history,
        DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, BIAS, FAST,
    )  # fmt: skip


@triton.jit
def padded_attention(
    uvqk, times, next_times, lengths, position_bias, time_bias, bucket_edges, padded, heads, max_length, out,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """out [B, L, H·DV] = u ⊙ LN(o) of padded histories, zero from lengths[b] on; L is `padded`.

    uvqk [B, L, H·(2·DV + 2·DQK)] after SiLU, columns in the order u, v, q, k; times and next_times int64 [B, L],
    lengths int64 [B]. Arguments stand in the order in which TensorRT passes them: inputs, whole numbers, outputs. What
    it cannot pass is a constant (EPSILON) or follows from what it can.
    """
    user = tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(lengths + user), padded).to(tl.int32)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row, out_row, begin = heads * (2 * DV + 2 * DQK), heads * DV, user * padded
    u, out = uvqk + begin * row, out + begin * out_row
    v = u + heads * DV
    q = v + heads * DV
    k = q + heads * DQK
    if first < length:
        gated_rows(
            q, k, v, u, out, row, row, row, row, out_row, times + begin, next_times + begin, position_bias, time_bias,
            bucket_edges, max_length, 1.0 / max_length, EPSILON, heads, first, length, length,
            DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, BIAS, FAST,
        )  # fmt: skip
    if first + BLOCK_M > length:  # what is computed of padding must be a number: it may be multiplied by zero
        i, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
        padding = (i >= length)[:, None] & (i < padded)[:, None] & (d < DV)[None, :]
        pointers = out + i[:, None] * out_row + d[None, :]
        nothing = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32).to(out.dtype.element_ty)
        for head in range(heads):
            tl.store(pointers + head * DV, nothing, mask=padding)
