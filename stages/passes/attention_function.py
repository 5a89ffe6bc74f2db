"""The attention of every layer becomes a call of one model-local function, which a kernel can replace."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from hstu.config import HSTUConfig
from hstu.errors import GateError
from stages.onnx_files import scope
from stages.passes import function_bodies, functions, selection

REASON = "one definition for all layers: runtimes inline it, kernels and plugins replace it by name"


def apply(graph: gs.Graph, config: HSTUConfig) -> gs.Graph:
    """Between W_uvqk and W_o of every layer stands one call; the functions it names are defined in the model."""
    lengths = _input(graph, "lengths")
    for layer in range(config.num_layers):
        for projection in selection.nodes_of(graph, f"layers.{layer}.output", "MatMul"):
            _replace(graph, config, layer, projection.inputs[0], lengths)
    graph.cleanup()
    define_functions(graph, config)
    return graph


def define_functions(graph: gs.Graph, config: HSTUConfig) -> None:
    """The model defines exactly the attention functions that it calls."""
    called = {node.op for node in graph.nodes if node.domain == functions.DOMAIN}
    protos = [
        functions.attention_function(name, config, graph.opset) for name in functions.ATTRIBUTES if name in called
    ]
    graph.functions = [OnnxImporter.import_function(proto) for proto in protos]


def call(
    graph: gs.Graph, function: str, module: str, inputs: list[gs.Tensor], output: gs.Tensor, **attributes: int | float
) -> None:
    """`output` is what the function returns for `inputs`."""
    graph.nodes.append(
        gs.Node(
            op=function,
            domain=functions.DOMAIN,
            name=f"{module}/{function}",
            inputs=inputs,
            outputs=[output],
            attrs={name: attributes[name] for name in functions.ATTRIBUTES[function]},
        )
    )


def _replace(graph: gs.Graph, config: HSTUConfig, layer: int, gated: gs.Tensor, lengths: gs.Tensor) -> None:
    """The subgraph that makes `gated` is cut at the projections before it, and a call put in its place."""
    gate = selection.producer(gated, "Mul")  # u ⊙ LN(a · v)
    module = scope(gate.name)
    tables = [selection.constant(graph, f"layers.{layer}.attention.{name}") for name in ("position_bias", "time_bias")]
    inside, boundary = _walk(gated)
    boundary = [t for t in boundary if not _is_cache_of(t, layer)]
    _check_boundary(boundary, f"layers.{layer}.uvqk", module)
    queries = selection.only(
        (t for side in gate.inputs for t in boundary if _floats(t) and _is_split_of(side, t)),
        f"one projection that gates {module}",
    )
    buckets = _buckets(tables[1], inside, module)
    gated.inputs.clear()
    sizes = functions.attributes(config)
    if module.endswith(".candidate_attention"):
        history = selection.only(
            (t for t in boundary if _floats(t) and t is not queries), f"one projected history in {module}"
        )
        columns = {"v_offset": config.num_heads * config.v_dim}
        columns["k_offset"] = config.uvqk_dim - config.num_heads * config.qk_dim
        inputs = [history, queries, buckets, lengths, *tables]
        call(graph, function_bodies.CANDIDATES, module, inputs, gated, **sizes, **columns)
    elif module.endswith(".extend_attention"):
        cache, cached_lengths = (_input(graph, name) for name in ("cache", "cached_lengths"))
        inputs = [queries, cache, buckets, cached_lengths, lengths, *tables]
        call(graph, function_bodies.EXTEND, module, inputs, gated, **sizes, layer=layer)
    else:
        call(graph, function_bodies.HISTORY, module, [queries, buckets, lengths, *tables], gated, **sizes)


def _input(graph: gs.Graph, name: str) -> gs.Tensor:
    return selection.only((value for value in graph.inputs if value.name == name), f"input {name}")


def _is_split_of(side: gs.Tensor, projection: gs.Tensor) -> bool:
    """Whether `side` is a part of SiLU(projection), with nothing else between: the gate u."""
    if len(side.inputs) != 1 or side.inputs[0].op != "Split":
        return False
    silu = side.inputs[0].inputs[0]
    return len(silu.inputs) == 1 and silu.inputs[0].op == "Mul" and any(t is projection for t in silu.inputs[0].inputs)


def _is_cache_of(tensor: gs.Tensor, layer: int) -> bool:
    """Whether `tensor` is a part of the input `cache`, taken at this layer's index."""
    while tensor.inputs and tensor.inputs[0].op == "Split":
        tensor = tensor.inputs[0].inputs[0]
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op != "Gather" or node.inputs[0].name != "cache" or node.inputs[0].inputs:
        return False
    index = node.inputs[1]
    return isinstance(index, gs.Constant) and node.attrs.get("axis", 0) == 1 and index.values.tolist() == layer


def _buckets(time_bias: gs.Constant, inside: list[gs.Tensor], module: str) -> gs.Tensor:
    """The int64 tensor [B, ·, L] at which the subgraph reads its time bias."""
    made = {id(tensor) for tensor in inside}
    lookups = [node for node in time_bias.outputs if node.op == "GatherND" and id(node.outputs[0]) in made]
    found = [selection.producer(node.inputs[1], "Unsqueeze").inputs[0] for node in lookups]
    # A candidate's own bucket is read as well, at [B, ·].
    return selection.only((tensor for tensor in found if len(tensor.shape) == 3), f"time buckets in {module}")


def _walk(gated: gs.Tensor) -> tuple[list[gs.Tensor], list[gs.Tensor]]:
    """What attention modules compute on the way to `gated`, and what they read from outside, constants apart."""
    inside: dict[int, gs.Tensor] = {}
    outside: dict[int, gs.Tensor] = {}
    pending = [gated]
    while pending:
        tensor = pending.pop()
        if id(tensor) in inside or isinstance(tensor, gs.Constant) or tensor.is_empty():
            continue
        # Tensors that all layers share, such as the mask, were traced in the first layer's attention.
        if tensor.inputs and scope(tensor.inputs[0].name).endswith("attention"):
            inside[id(tensor)] = tensor
            pending.extend(tensor.inputs[0].inputs)
        else:
            outside[id(tensor)] = tensor
    return list(inside.values()), list(outside.values())


def _floats(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and tensor.dtype == "float32"


def _check_boundary(boundary: list[gs.Tensor], projection: str, module: str) -> None:
    """The only floats that the subgraph reads are this layer's projections."""
    for tensor in boundary:
        if _floats(tensor) and not (tensor.inputs and scope(tensor.inputs[0].name) == projection):
            raise GateError(
                f"surgery: {module} reads {tensor.name!r}, which is not one of its inputs",
                expected=f"the output of {projection} and integers",
                fix="leave attention_function out of surgery.passes, and report the version of torch",
            )
