"""The bodies of the attention functions, in ONNX's own text form: standard operators alone.

`$NAME` stands for a size of the model (`stages.passes.functions`, where the interfaces are said).

The sum over j is not divided by N here: LN(o / N) = LN(o) when epsilon is multiplied by N². Constants
take the type of the data (CastLike) and the LayerNorm is computed in float32, so that a body stays right
when its inputs become float16 or bfloat16.
"""

from __future__ import annotations

import re

HISTORY = "HSTUAttention"
QUERIES = "HSTUQueryAttention"
CANDIDATES = "HSTUCandidateAttention"
EXTEND = "HSTUExtendAttention"
EXTEND_QUERIES = "HSTUExtendQueryAttention"

_AXES = """
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    first_axis = Constant<value_ints = [1]>()
    qk_heads = Constant<value_ints = [0, 0, $H, $DQK]>()
    v_heads = Constant<value_ints = [0, 0, $H, $DV]>()
"""

_POSITIONS = """
    key_count = Shape<start = 2, end = 3>(buckets)
    key_end = Squeeze(key_count)
    keys_at = Range(zero, key_end, one)
"""

_KEYS = """
    k_split = Reshape(k_rows, qk_heads)
    k = Transpose<perm = [0, 2, 3, 1]>(k_split)
    v_split = Reshape(v_rows, v_heads)
    v = Transpose<perm = [0, 2, 1, 3]>(v_split)
"""

_WEIGHTS = """
    time_part = Gather(time_bias, buckets)
    bias = Add(time_part, position_part)
    bias_heads = Unsqueeze(bias, first_axis)
    scores = Add(products, bias_heads)
    scores_gate = Sigmoid(scores)
    weights = Mul(scores, scores_gate)
    masked = Mul(weights, mask)
"""

# From q_rows, k, v, position_part and mask to the weighted sum of values, rows of [·, H, dv].
_ATTEND = f"""
    q_split = Reshape(q_rows, qk_heads)
    q = Transpose<perm = [0, 2, 1, 3]>(q_split)
    products = MatMul(q, k)
    {_WEIGHTS}
    sums = MatMul(masked, v)
    sum_rows = Transpose<perm = [0, 2, 1, 3]>(sums)
"""

# LN(o / N) = LN(o) with epsilon · N².
_GATE = """
    row_shape = Constant<value_ints = [0, 0, $HV]>()
    flat = Reshape(attended, row_shape)
    wide = Cast<to = 1>(flat)
    row_size = Constant<value_ints = [$HV]>()
    scale = ConstantOfShape<value = float[1] {1.0}>(row_size)
    normed = LayerNormalization<axis = -1, epsilon = $EPS>(wide, scale)
    narrow = CastLike(normed, u)
    gated = Mul(u, narrow)
"""

# position_part[i, j] = position_bias[N-1 + j - i] for j <= i, as copies of one row instead of L² look-ups: with
# period = (distance 0, distance -L, ..., distance -1), of length L+1, element i·L + j of the repeated period is
# period[(j - i) mod (L+1)]. What stands at j > i is masked.
_TOEPLITZ = """
    center = Constant<value_ints = [$CENTER]>()
    after_center = Constant<value_ints = [$AFTER]>()
    at_zero = Slice(position_bias, center, after_center)
    furthest = Sub(center, key_count)
    before = Slice(position_bias, furthest, center)
    period = Concat<axis = 0>(at_zero, before)
    origin = Constant<value_ints = [0]>()
    column_shape = Concat<axis = 0>(key_count, first_axis)
    repeated = Expand(period, column_shape)
    flat_shape = Constant<value_ints = [-1]>()
    repeated_flat = Reshape(repeated, flat_shape)
    num_pairs = Mul(key_count, key_count)
    pairs = Slice(repeated_flat, origin, num_pairs)
    square_shape = Concat<axis = 0>(key_count, key_count)
    position_part = Reshape(pairs, square_shape)
"""

# Up to the mask, all that attention of a history is made of; then either all pairs at once or tile by tile.
_HISTORY_FORMALS = "uvqk, buckets, lengths, position_bias, time_bias"
_HISTORY_PARTS = f"""
    {_AXES}{_POSITIONS}
    uvqk_gate = Sigmoid(uvqk)
    uvqk_silu = Mul(uvqk, uvqk_gate)
    columns = Constant<value_ints = [$HV, $HV, $HQK, $HQK]>()
    u, v_rows, q_rows, k_rows = Split<axis = 2>(uvqk_silu, columns)
    {_KEYS}
    rows_at = Unsqueeze(keys_at, first_axis)
    distance = Sub(keys_at, rows_at)
    {_TOEPLITZ}
    causal = LessOrEqual(distance, zero)
    lengths_shape = Constant<value_ints = [-1, 1, 1]>()
    ends = Reshape(lengths, lengths_shape)
    inside = Less(keys_at, ends)
    allowed = And(causal, inside)
    allowed_heads = Unsqueeze(allowed, first_axis)
    mask = CastLike(allowed_heads, uvqk)
"""

_HISTORY = (
    _HISTORY_FORMALS,
    f"""
    {_HISTORY_PARTS}
    {_ATTEND}
    attended = Identity(sum_rows)
    {_GATE}
    """,
)


def tiled_history(tiles: int) -> tuple[str, str]:
    """The body of HSTUAttention whose rows are cut into tiles that read the keys up to their last row."""
    each = "\n".join(_tile(index) for index in range(tiles))
    return (
        _HISTORY_FORMALS,
        f"""
    {_HISTORY_PARTS}
    q_split = Reshape(q_rows, qk_heads)
    q = Transpose<perm = [0, 2, 1, 3]>(q_split)
    row_axis = Constant<value_ints = [2]>()
    key_axis = Constant<value_ints = [3]>()
    pair_axes = Constant<value_ints = [2, 3]>()
    head_axes = Constant<value_ints = [0, 1]>()
    position_heads = Unsqueeze(position_part, head_axes)
    buckets_heads = Unsqueeze(buckets, first_axis)
    num_tiles = Constant<value_ints = [{tiles}]>()
    stop_0 = Constant<value_ints = [0]>()
    {each}
    sums = Concat<axis = 2>({", ".join(f"sums_{index + 1}" for index in range(tiles))})
    attended = Transpose<perm = [0, 2, 1, 3]>(sums)
    {_GATE}
    """,
    )


def _tile(index: int) -> str:
    """Rows stop_i .. stop_{i+1} of the history; none when there are fewer events than tiles."""
    body = f"""
    through = Constant<value_ints = [{index + 1}]>()
    rows_before = Mul(key_count, through)
    stop = Div(rows_before, num_tiles)
    pair_start = Concat<axis = 0>(PREVIOUS, origin)
    pair_stop = Concat<axis = 0>(stop, stop)
    q_tile = Slice(q, PREVIOUS, stop, row_axis)
    k_tile = Slice(k, origin, stop, key_axis)
    v_tile = Slice(v, origin, stop, row_axis)
    buckets_tile = Slice(buckets_heads, pair_start, pair_stop, pair_axes)
    position_tile = Slice(position_heads, pair_start, pair_stop, pair_axes)
    mask_tile = Slice(mask, pair_start, pair_stop, pair_axes)
    products = MatMul(q_tile, k_tile)
    time_tile = Gather(time_bias, buckets_tile)
    bias = Add(time_tile, position_tile)
    scores = Add(products, bias)
    scores_gate = Sigmoid(scores)
    weights = Mul(scores, scores_gate)
    masked = Mul(weights, mask_tile)
    sums = MatMul(masked, v_tile)"""
    made = re.findall(r"(\w+) =", re.sub(r"<.*?>", "", body))
    names = "|".join(sorted(made, key=len, reverse=True))
    body = re.sub(rf"\b({names})\b", rf"\1_{index + 1}", body)
    return body.replace("PREVIOUS", f"stop_{index}")


_QUERIES = (
    "uq, kv, buckets, position, position_bias, time_bias",
    f"""
    {_AXES}{_POSITIONS}
    uq_gate = Sigmoid(uq)
    uq_silu = Mul(uq, uq_gate)
    uq_columns = Constant<value_ints = [$HV, $HQK]>()
    u, q_rows = Split<axis = 2>(uq_silu, uq_columns)
    kv_gate = Sigmoid(kv)
    kv_silu = Mul(kv, kv_gate)
    kv_columns = Constant<value_ints = [$HQK, $HV]>()
    k_rows, v_rows = Split<axis = 2>(kv_silu, kv_columns)
    {_KEYS}
    last_axis = Constant<value_ints = [-1]>()
    rows_at = Unsqueeze(position, last_axis)
    distance = Sub(keys_at, rows_at)
    seen = Min(distance, zero)
    center = Constant<value_int = $CENTER>()
    index = Add(seen, center)
    position_part = Gather(position_bias, index)
    allowed = LessOrEqual(distance, zero)
    allowed_heads = Unsqueeze(allowed, first_axis)
    mask = CastLike(allowed_heads, uq)
    {_ATTEND}
    attended = Identity(sum_rows)
    {_GATE}
    """,
)

_CANDIDATES = (
    "history, candidates, buckets, lengths, position_bias, time_bias",
    f"""
    {_AXES}{_POSITIONS}
    history_gate = Sigmoid(history)
    history_silu = Mul(history, history_gate)
    columns_axis = Constant<value_ints = [2]>()
    origin = Constant<value_ints = [0]>()
    v_first = Constant<value_int: int = @v_offset>()
    v_start = Unsqueeze(v_first, origin)
    v_width = Constant<value_ints = [$HV]>()
    v_stop = Add(v_start, v_width)
    v_rows = Slice(history_silu, v_start, v_stop, columns_axis)
    k_first = Constant<value_int: int = @k_offset>()
    k_start = Unsqueeze(k_first, origin)
    k_width = Constant<value_ints = [$HQK]>()
    k_stop = Add(k_start, k_width)
    k_rows = Slice(history_silu, k_start, k_stop, columns_axis)
    {_KEYS}
    candidates_gate = Sigmoid(candidates)
    candidates_silu = Mul(candidates, candidates_gate)
    columns = Constant<value_ints = [$HV, $HV, $HQK, $HQK]>()
    u, own_v_rows, q_rows, own_k_rows = Split<axis = 2>(candidates_silu, columns)
    lengths_shape = Constant<value_ints = [-1, 1, 1]>()
    standing_at = Reshape(lengths, lengths_shape)
    distance = Sub(keys_at, standing_at)
    seen = Min(distance, zero)
    center = Constant<value_int = $CENTER>()
    index = Add(seen, center)
    position_part = Gather(position_bias, index)
    allowed = Less(distance, zero)
    allowed_heads = Unsqueeze(allowed, first_axis)
    mask = CastLike(allowed_heads, candidates)
    {_ATTEND}
    own_k = Reshape(own_k_rows, qk_heads)
    own_v = Reshape(own_v_rows, v_heads)
    last_axis = Constant<value_ints = [-1]>()
    own_products = Mul(q_split, own_k)
    own_product = ReduceSum<keepdims = 1>(own_products, last_axis)
    own_position = Gather(position_bias, center)
    own_time = Gather(time_bias, zero)
    own_bias = Add(own_time, own_position)
    own_score = Add(own_product, own_bias)
    own_gate = Sigmoid(own_score)
    own_weight = Mul(own_score, own_gate)
    own = Mul(own_v, own_weight)
    attended = Add(sum_rows, own)
    {_GATE}
    """,
)

# Positions of keys [B, P+E] and of rows [B, Q]: what is not there stands after every row, and so is not seen.
# From q_rows, k_rows, v_rows, new_alive and rows_at (which of the new events each row is) to the sum of both parts.
_ATTEND_CACHED = f"""
    firsts_shape = Constant<value_ints = [-1, 1]>()
    last_axis = Constant<value_ints = [-1]>()
    unseen = Constant<value_int = $UNSEEN>()
    firsts = Reshape(cached_lengths, firsts_shape)
    layer_at = Constant<value_int: int = @layer>()
    cached = Gather<axis = 1>(cache, layer_at)
    past_count = Shape<start = 1, end = 2>(cached)
    past_end = Squeeze(past_count)
    past_at = Range(zero, past_end, one)
    alive = Less(past_at, firsts)
    alive_rows = Unsqueeze(alive, last_axis)
    nothing_wide = Constant<value_float = 0.0>()
    nothing = CastLike(nothing_wide, cached)
    cached_alive = Where(alive_rows, cached, nothing)
    cached_columns = Constant<value_ints = [$HQK, $HV]>()
    past_k_rows, past_v_rows = Split<axis = 2>(cached_alive, cached_columns)
    past_k_split = Reshape(past_k_rows, qk_heads)
    past_k = Transpose<perm = [0, 2, 3, 1]>(past_k_split)
    past_v_split = Reshape(past_v_rows, v_heads)
    past_v = Transpose<perm = [0, 2, 1, 3]>(past_v_split)
    past_keys_at = Where(alive, past_at, unseen)
    new_positions = Add(firsts, new_at)
    new_keys_at = Where(new_alive, new_positions, unseen)
    all_keys_at = Concat<axis = 1>(past_keys_at, new_keys_at)
    keys_at = Unsqueeze(all_keys_at, first_axis)
    rows_stand_at = Add(firsts, rows_at)
    stand_at = Unsqueeze(rows_stand_at, last_axis)
    distance = Sub(keys_at, stand_at)
    furthest = Constant<value_int = $FURTHEST>()
    near = Max(distance, furthest)
    seen = Min(near, zero)
    center = Constant<value_int = $CENTER>()
    index = Add(seen, center)
    position_part = Gather(position_bias, index)
    allowed = LessOrEqual(distance, zero)
    allowed_heads = Unsqueeze(allowed, first_axis)
    mask = CastLike(allowed_heads, q_rows)
    q_split = Reshape(q_rows, qk_heads)
    q = Transpose<perm = [0, 2, 1, 3]>(q_split)
    past_products = MatMul(q, past_k)
    new_products = MatMul(q, k)
    products = Concat<axis = 3>(past_products, new_products)
    {_WEIGHTS}
    origin = Constant<value_ints = [0]>()
    key_axis = Constant<value_ints = [3]>()
    past_weights = Slice(masked, origin, past_count, key_axis)
    past_sums = MatMul(past_weights, past_v)
    key_count = Add(past_count, new_count)
    new_weights = Slice(masked, past_count, key_count, key_axis)
    new_sums = MatMul(new_weights, v)
    sums = Add(past_sums, new_sums)
    attended = Transpose<perm = [0, 2, 1, 3]>(sums)
"""

_NEW = """
    new_count = Shape<start = 1, end = 2>(k_rows)
    new_end = Squeeze(new_count)
    new_at = Range(zero, new_end, one)
"""

_EXTEND = (
    "uvqk, cache, buckets, cached_lengths, lengths, position_bias, time_bias",
    f"""
    {_AXES}
    uvqk_gate = Sigmoid(uvqk)
    uvqk_silu = Mul(uvqk, uvqk_gate)
    columns = Constant<value_ints = [$HV, $HV, $HQK, $HQK]>()
    u, v_rows, q_rows, k_rows = Split<axis = 2>(uvqk_silu, columns)
    {_KEYS}{_NEW}
    lengths_shape = Constant<value_ints = [-1, 1]>()
    ends = Reshape(lengths, lengths_shape)
    new_alive = Less(new_at, ends)
    origin_axis = Constant<value_ints = [0]>()
    rows_at = Unsqueeze(new_at, origin_axis)
    {_ATTEND_CACHED}{_GATE}
    """,
)

_EXTEND_QUERIES = (
    "uq, kv, cache, buckets, cached_lengths, position, position_bias, time_bias",
    f"""
    {_AXES}
    uq_gate = Sigmoid(uq)
    uq_silu = Mul(uq, uq_gate)
    uq_columns = Constant<value_ints = [$HV, $HQK]>()
    u, q_rows = Split<axis = 2>(uq_silu, uq_columns)
    kv_gate = Sigmoid(kv)
    kv_silu = Mul(kv, kv_gate)
    kv_columns = Constant<value_ints = [$HQK, $HV]>()
    k_rows, v_rows = Split<axis = 2>(kv_silu, kv_columns)
    {_KEYS}{_NEW}
    new_alive = GreaterOrEqual(new_at, zero)
    rows_at = Identity(position)
    {_ATTEND_CACHED}{_GATE}
    """,
)

BODIES = {
    HISTORY: _HISTORY,
    QUERIES: _QUERIES,
    CANDIDATES: _CANDIDATES,
    EXTEND: _EXTEND,
    EXTEND_QUERIES: _EXTEND_QUERIES,
}
