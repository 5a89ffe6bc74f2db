"""The last layer computes only what is read of it: one row in `retrieve` and `extend`, keys and values in `rank`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from hstu.config import HSTUConfig
from stages.passes import function_bodies, functions, selection
from stages.passes.attention_function import call, define_functions

REASON = "of the last layer only the last event is read (retrieve, extend), or only keys and values (rank)"


def apply(graph: gs.Graph, config: HSTUConfig) -> gs.Graph:
    """The last layer's W_uvqk is split into the columns that are needed, and applied to the rows that are."""
    module = f"layers.{config.num_layers - 1}"
    if graph.name in ("retrieve", "extend"):
        _last_row_alone(graph, config, module)
    elif graph.name == "rank":
        _keys_and_values_alone(graph, config, module)
    graph.cleanup()
    define_functions(graph, config)
    return graph


def _last_row_alone(graph: gs.Graph, config: HSTUConfig, module: str) -> None:
    """u and q are computed for the last event [B, 1, ·], as what follows the attention is; k and v for all events."""
    extends = graph.name == "extend"
    scope, function = (
        ("extend_attention", function_bodies.EXTEND) if extends else ("attention", function_bodies.HISTORY)
    )
    attention = selection.only(selection.nodes_of(graph, f"{module}.{scope}", function), f"one call in {module}")
    if extends:
        uvqk, cache, buckets, cached_lengths, lengths, *tables = attention.inputs
    else:
        uvqk, buckets, lengths, *tables = attention.inputs
    projection = selection.producer(uvqk, "MatMul")
    normed, weight = projection.inputs
    output = attention.outputs[0]
    addition, skipped, state = _residual(output, f"{module}.output")
    read = selection.only(state.outputs, f"one reader of the state after {module}")

    one, zero = np.array([1], dtype=np.int64), np.array(0, dtype=np.int64)
    last = selection.add(graph, "Sub", f"{module}.last", [lengths, one])  # -1 for an empty history: it sees nothing
    position = selection.add(graph, "Unsqueeze", f"{module}.position", [last, one])
    row = selection.add(graph, "Max", f"{module}.row", [position, zero])
    index = selection.add(graph, "Unsqueeze", f"{module}.index", [row, np.array([2], dtype=np.int64)])  # [B, 1, 1]

    def last_row(tensor: gs.Tensor, name: str) -> gs.Variable:
        return selection.add(graph, "GatherND", f"{module}.{name}", [tensor, index], attrs={"batch_dims": 1})

    columns = _columns(config)
    uq_weight, kv_weight = _part(weight, "uq", columns), _part(weight, "kv", columns)
    uq = selection.add(graph, "MatMul", f"{module}.uvqk.uq", [last_row(normed, "last_normed"), uq_weight])
    kv = selection.add(graph, "MatMul", f"{module}.uvqk.kv", [normed, kv_weight])
    last_buckets = last_row(buckets, "last_buckets")
    output.inputs.clear()
    sizes = functions.attributes(config)
    if extends:
        rows = selection.only(selection.nodes_of(graph, f"{module}.cache_rows", "Concat"), f"cache rows of {module}")
        selection.replace_uses(rows.outputs[0], kv)
        inputs = [uq, kv, cache, last_buckets, cached_lengths, position, *tables]
        layer = attention.attrs["layer"]
        call(graph, function_bodies.EXTEND_QUERIES, f"{module}.{scope}", inputs, output, **sizes, layer=layer)
    else:
        inputs = [uq, kv, last_buckets, position, *tables]
        call(graph, function_bodies.QUERIES, f"{module}.{scope}", inputs, output, **sizes)
    addition.inputs[skipped] = last_row(addition.inputs[skipped], "last_input")
    selection.replace_uses(read.outputs[0], state)


def _keys_and_values_alone(graph: gs.Graph, config: HSTUConfig, module: str) -> None:
    """The history's last projection gives k and v alone [B, L, H·(dqk + dv)]."""
    attention = selection.only(
        selection.nodes_of(graph, f"{module}.candidate_attention", function_bodies.CANDIDATES), f"one call in {module}"
    )
    normed, weight = selection.producer(attention.inputs[0], "MatMul").inputs
    weight = _part(weight, "kv", _columns(config))
    attention.inputs[0] = selection.add(graph, "MatMul", f"{module}.uvqk.kv", [normed, weight])
    attention.attrs["k_offset"], attention.attrs["v_offset"] = 0, config.num_heads * config.qk_dim


def _residual(gated: gs.Tensor, module: str) -> tuple[gs.Node, int, gs.Tensor]:
    """The addition of x and W_o(gated) + bias, which of its inputs is x, and the state it makes."""
    product = selection.only(gated.outputs, f"one projection {module}").outputs[0]
    biased = selection.only(product.outputs, f"one bias of {module}").outputs[0]
    addition = selection.only((node for node in biased.outputs if node.op == "Add"), f"one residual of {module}")
    return addition, 1 - addition.inputs.index(biased), addition.outputs[0]


def _columns(config: HSTUConfig) -> dict[str, npt.NDArray[np.int64]]:
    """Which columns of W_uvqk, whose order is u, v, q, k, make uq and kv."""
    hv, hqk = config.num_heads * config.v_dim, config.num_heads * config.qk_dim
    u, v, q, k = np.split(np.arange(config.uvqk_dim), np.cumsum([hv, hv, hqk]))
    return {"uq": np.concatenate([u, q]), "kv": np.concatenate([k, v])}


def _part(weight: gs.Constant, name: str, columns: dict[str, npt.NDArray[np.int64]]) -> gs.Constant:
    """Some columns of a weight [D, W] as a constant of its own."""
    return gs.Constant(f"{weight.name}.{name}", np.ascontiguousarray(weight.values[:, columns[name]]))
