"""HSTU attention as ONNX model-local functions of the domain `hstu`: the interface that kernels replace.

Each function is written once (`stages.passes.function_bodies`), from standard operators. A runtime without a
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
    HSTUExtendAttention(uvqk [B,E,W], cache [B,layers,P,W/2], buckets i64 [B,E,P+E], cached_lengths i64 [B],
                        lengths i64 [B], position_bias, time_bias)
        -> gated [B,E,H·dv]                  new event i sees the cached events and the new ones up to itself
    HSTUExtendQueryAttention(uq [B,Q,W/2], kv [B,E,W/2], cache [B,layers,P,W/2], buckets i64 [B,Q,P+E],
                             cached_lengths i64 [B], position i64 [B,Q], position_bias, time_bias)
        -> gated [B,Q,H·dv]                  row i is the new event position[b,i] and sees what that event sees

The cache (`hstu.signature.CacheSpec`) comes whole and already activated; the attribute `layer` says which layer's
rows [B,P,W/2], columns k, v, are meant. Rows from cached_lengths[b] on are never read, whatever stands there.
Columns: uvqk and candidates in the order u, v, q, k; uq u, q; kv k, v. In `history` v starts at column
`v_offset` and k at `k_offset`, so that it may be a whole uvqk or only what is needed of it.
Attributes of every call: num_heads H, qk_dim dqk, v_dim dv, max_length N, epsilon of the LayerNorm.
The bodies are written for one model's sizes; the attributes tell a kernel the same sizes.
"""

from __future__ import annotations

import re

import onnx

from hstu.config import LAYER_NORM_EPS, HSTUConfig
from stages.passes.function_bodies import BODIES, CANDIDATES, EXTEND, EXTEND_QUERIES, HISTORY, QUERIES, tiled_history

DOMAIN = "hstu"
DOMAIN_VERSION = 1

_COMMON = ("num_heads", "qk_dim", "v_dim", "max_length", "epsilon")
ATTRIBUTES = {
    HISTORY: _COMMON,
    QUERIES: _COMMON,
    CANDIDATES: (*_COMMON, "v_offset", "k_offset"),
    EXTEND: (*_COMMON, "layer"),
    EXTEND_QUERIES: (*_COMMON, "layer"),
}


def attributes(config: HSTUConfig) -> dict[str, int | float]:
    """The attributes that every call carries."""
    return {
        "num_heads": config.num_heads,
        "qk_dim": config.qk_dim,
        "v_dim": config.v_dim,
        "max_length": config.max_length,
        "epsilon": LAYER_NORM_EPS,
    }


def attention_function(name: str, config: HSTUConfig, opset: int, *, tiles: int = 1) -> onnx.FunctionProto:
    """The function's definition for a model of this shape; every name in it begins with `<name>.`.

    HSTUAttention may be computed in `tiles` tiles (`stages.passes.causal_tiles`).
    """
    formals, body = BODIES[name] if tiles == 1 else tiled_history(tiles)
    sizes = {
        "H": config.num_heads,
        "DQK": config.qk_dim,
        "DV": config.v_dim,
        "HQK": config.num_heads * config.qk_dim,
        "HV": config.num_heads * config.v_dim,
        "CENTER": config.max_length - 1,
        "AFTER": config.max_length,
        "FURTHEST": 1 - config.max_length,
        "UNSEEN": 4 * config.max_length,  # a position after every other
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
