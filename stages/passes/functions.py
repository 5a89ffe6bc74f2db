"""HSTU attention as ONNX model-local functions of the domain `hstu`: the interface that kernels replace.

Each function is written here once, in ONNX's own text form, from standard operators. A runtime without a
kernel inlines it; a runtime with one replaces the call and never looks inside. All take the projections
before SiLU and give the gated output u ⊙ LN(a · v) (`hstu.model`, shape letters of `hstu.signature`);
W = 2·H·(dv + dqk).

    HSTUAttention(uvqk [B,L,W], buckets i64 [B,L,L], lengths i64 [B], position_bias [2N-1], time_bias [129])
        -> gated [B,L,H·dv]                  every event sees the events up to itself
    HSTUQueryAttention(uq [B,Q,W/2], kv [B,L,W/2], buckets i64 [B,Q,L], position i64 [B,Q], position_bias, time_bias)
        -> gated [B,Q,H·dv]                  row i stands at position[b,i] and sees the events up to there
    HSTUCandidateAttention(history [B,L,·], candidates [B,C,W], buckets i64 [B,1,L], lengths i64 [B],
                           position_bias, time_bias)
        -> gated [B,C,H·dv]                  every candidate sees the whole history and itself

Columns: uvqk and candidates in the order u, v, q, k; uq u, q; kv k, v. In `history` v starts at column
`v_offset` and k at `k_offset`, so that it may be a whole uvqk or only what is needed of it.
Attributes of every call: num_heads H, qk_dim dqk, v_dim dv, max_length N, epsilon of the LayerNorm.
The bodies are written for one model's sizes; the attributes tell a kernel the same sizes.

The sum over j is not divided by N here: LN(o / N) = LN(o) when epsilon is multiplied by N². Constants
take the type of the data (CastLike) and the LayerNorm is computed in float32, so that a body stays right
when its inputs become float16 or bfloat16.
"""

from __future__ import annotations

import re

import onnx

from hstu.config import LAYER_NORM_EPS, HSTUConfig

DOMAIN = "hstu"
DOMAIN_VERSION = 1
HISTORY = "HSTUAttention"
QUERIES = "HSTUQueryAttention"
CANDIDATES = "HSTUCandidateAttention"

_COMMON = ("num_heads", "qk_dim", "v_dim", "max_length", "epsilon")
ATTRIBUTES = {HISTORY: _COMMON, QUERIES: _COMMON, CANDIDATES: (*_COMMON, "v_offset", "k_offset")}


def attributes(config: HSTUConfig) -> dict[str, int | float]:
    """The attributes that every call carries."""
    return {
        "num_heads": config.num_heads,
        "qk_dim": config.qk_dim,
        "v_dim": config.v_dim,
        "max_length": config.max_length,
        "epsilon": LAYER_NORM_EPS,
    }


def attention_function(name: str, config: HSTUConfig, opset: int) -> onnx.FunctionProto:
    """The function's definition for a model of this shape; every name in it begins with `<name>.`."""
    formals, body = _BODIES[name]
    sizes = {
        "H": config.num_heads,
        "DQK": config.qk_dim,
        "DV": config.v_dim,
        "HQK": config.num_heads * config.qk_dim,
        "HV": config.num_heads * config.v_dim,
        "CENTER": config.max_length - 1,
        "AFTER": config.max_length,
        "EPS": f"{LAYER_NORM_EPS * config.max_length**2:.9g}",
    }
    body = re.sub(r"\$(\w+)", lambda match: str(sizes[match[1]]), body)
    text = f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
    {name} <{", ".join(ATTRIBUTES[name])}> ({formals}) => (gated) {{ {body} }}"""
    function = onnx.parser.parse_function(text)
    for field in (function.input, function.output):
        field[:] = [f"{name}.{formal}" for formal in field]
    for node in function.node:
        node.input[:] = [f"{name}.{value}" for value in node.input]
        node.output[:] = [f"{name}.{value}" for value in node.output]
        node.name = f"{node.output[0]}/{node.op_type}"
    return function


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

# From q_rows, k, v, position_part and mask to the weighted sum of values, rows of [·, H, dv].
_ATTEND = """
    q_split = Reshape(q_rows, qk_heads)
    q = Transpose<perm = [0, 2, 1, 3]>(q_split)
    products = MatMul(q, k)
    time_part = Gather(time_bias, buckets)
    bias = Add(time_part, position_part)
    bias_heads = Unsqueeze(bias, first_axis)
    scores = Add(products, bias_heads)
    scores_gate = Sigmoid(scores)
    weights = Mul(scores, scores_gate)
    masked = Mul(weights, mask)
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

_HISTORY = (
    "uvqk, buckets, lengths, position_bias, time_bias",
    f"""
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
    {_ATTEND}
    attended = Identity(sum_rows)
    {_GATE}
    """,
)

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

_BODIES = {HISTORY: _HISTORY, QUERIES: _QUERIES, CANDIDATES: _CANDIDATES}
