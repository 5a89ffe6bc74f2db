"""What a model takes: parameters, bytes and FLOPs by component, worked out from its shape alone.

Counts of parameters and of matrix-product FLOPs are exact (tests hold them against the model itself); memory at
run time is a model of which tensors are alive together. Letters: `hstu.signature`; W is the width of the fused
projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hstu.config import NUM_TIME_BUCKETS, HSTUConfig
from hstu.signature import EntryName

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Kind = Literal["table", "matrix", "vector"]
WIDTH: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # bytes of one value


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """A part of the model: `columns` is how many scales its int8 form has (one per output column), 0 if it has none."""

    name: str
    parameters: int
    kind: Kind
    columns: int = 0


def components(config: HSTUConfig) -> list[Component]:
    """Every parameter of `hstu.model.HSTU`, once; layers are added up."""
    c = config
    values = c.num_heads * c.v_dim
    parts = [Component(name="item table", parameters=(c.num_items + 1) * c.embedding_dim, kind="table")]
    parts.append(Component(name="position table", parameters=c.max_length * c.embedding_dim, kind="table"))
    if c.num_actions:
        parts.append(Component(name="action table", parameters=c.num_actions * c.embedding_dim, kind="table"))
    if c.num_gap_buckets:
        parts.append(Component(name="gap table", parameters=c.num_gap_buckets * c.embedding_dim, kind="table"))
    n = c.num_layers
    parts += [
        _matrix("uvqk projections", n, c.embedding_dim, c.uvqk_dim),
        _matrix("output projections", n, values, c.embedding_dim, quantized=False),
        Component(name="output biases", parameters=n * c.embedding_dim, kind="vector"),
        Component(name="position bias tables", parameters=n * (2 * c.max_length - 1), kind="vector"),
        Component(name="time bias tables", parameters=n * (NUM_TIME_BUCKETS + 1), kind="vector"),
    ]
    if c.tasks:
        parts += [
            _matrix("head matrices (hidden)", 1, c.embedding_dim, c.head_dim),
            _matrix("head matrices (logits)", 1, c.head_dim, len(c.tasks), quantized=False),
            Component(name="head biases", parameters=c.head_dim + len(c.tasks), kind="vector"),
        ]
    return parts


def _matrix(name: str, count: int, rows: int, columns: int, *, quantized: bool = True) -> Component:
    scales = count * columns if quantized else 0  # what is left wide by default where int8 has one scale for all rows
    return Component(name=name, parameters=count * rows * columns, kind="matrix", columns=scales)


def weight_bytes(part: Component, precision: Precision) -> int:
    """Bytes of a component in an engine: int8 takes some matrices alone; fp16 and bf16 narrow everything."""
    if precision == "int8":
        return part.parameters + 4 * part.columns if part.columns else 4 * part.parameters
    return part.parameters * WIDTH[precision]


def serving_bytes(part: Component, precision: Precision) -> int:
    """Bytes of a component in vLLM, where tables and biases stay float32 and matrices take the model's dtype."""
    return part.parameters * (_serving_width(precision) if part.kind == "matrix" else 4)


def request_flops(config: HSTUConfig, entry: EntryName, length: int, candidates: int = 0) -> dict[str, int]:
    """FLOPs of the matrix products of one request with a history of `length` (2 a multiply-add).

    eager: every position of every layer, as `hstu.model` computes it; engine: of the last layer's history only
    what is read, as surgery leaves it; needed: that without the pairs that the causal mask throws away.
    """
    c = config
    d, values, width = c.embedding_dim, c.num_heads * c.v_dim, c.uvqk_dim
    per_pair = 2 * c.num_heads * (c.qk_dim + c.v_dim)  # a query with a key: score, and weighted value
    project, output = 2 * d * width, 2 * values * d  # of one row
    layer = length * (project + output) + length * length * per_pair
    before = (c.num_layers - 1) * layer
    keys = length * project // 2  # k and v are half of the projection
    if entry == "retrieve":
        head = 2 * d * c.num_items
        eager = before + layer + head
        engine = before + keys + project // 2 + length * per_pair + output + head
    else:
        one = c.num_layers * (project + output + length * per_pair) + 2 * (d + len(c.tasks)) * c.head_dim
        eager = before + length * project + candidates * one
        engine = before + keys + candidates * one
    masked = (c.num_layers - 1) * per_pair * length * (length - 1) // 2
    return {"eager": eager, "engine": engine, "needed": engine - masked}


def activation_bytes(
    config: HSTUConfig, entry: EntryName, batch: int, length: int, candidates: int, precision: Precision | None
) -> int:
    """Peak bytes of a padded batch beside the weights: of eager PyTorch (`precision` None), or of an engine.

    The largest of the phases: time buckets [B, L, L], a layer's attention (of the history, of the candidates), and
    the head over all items. Eager keeps three copies of the scores [B, H, rows, L] (with bias, divided, masked)
    and two of the projection; an engine reuses buffers in place: two and one, in its own width.
    """
    c, b, n, d = config, batch, length, config.embedding_dim
    eager = precision is None
    width = 4 if precision in (None, "fp32", "int8") else 2
    copies, projections = (3, 2) if eager else (2, 1)
    count = candidates if entry == "rank" else 0

    def attention(rows: int, pair_bytes: int) -> int:
        scores = width * b * c.num_heads * rows * n
        mixed = 2 * scores + width * b * rows * 2 * c.num_heads * c.v_dim  # weights · values: a copy of v, the sum
        return b * rows * n * pair_bytes + max(copies * scores, mixed)

    lasting = 8 * b * (6 * n + count) + 4 * b * (n + count) * d  # inputs and gaps; the residual stream
    buckets = 8 * b * n * n
    projected = projections * width * b * (n + count) * c.uvqk_dim
    phases = [
        lasting + (38 if eager else 24) * b * n * n,
        lasting + buckets + projected + attention(n, 1 + 4 + width) + 8 * n * n,  # mask, as float, bias; distances
    ]
    if entry == "rank":
        phases.append(lasting + buckets + projected + attention(count, 0))
    else:
        table = 0 if precision in ("fp32", "int8") else 4 * c.num_items * d  # normalised, or widened, for the product
        phases.append(lasting + buckets + table + (1 if eager else 2) * 4 * b * c.num_items)
    return max(phases)


def kv_cache(
    config: HSTUConfig, precision: Precision, *, length: int, block_size: int, free_bytes: int
) -> dict[str, Any]:
    """What a user's history costs in vLLM's pages ([blocks, H, block, dqk + dv] a layer), and how many users fit."""
    c = config
    cached = c.num_layers * c.num_heads * (c.qk_dim + c.v_dim) * _serving_width(precision)
    per_token = cached + 16  # and two int64 times by slot
    blocks_per_user = -(-(length + c.max_generated) // block_size)
    blocks = max(0, free_bytes) // (per_token * block_size)
    return {
        "bytes_per_token": per_token,
        "block_size_tokens": block_size,
        "bytes_per_block": per_token * block_size,
        "blocks_per_user": blocks_per_user,
        "bytes_per_user": blocks_per_user * per_token * block_size,
        "blocks": blocks,
        "tokens": blocks * block_size,
        "users": blocks // blocks_per_user,
    }


def _serving_width(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2
