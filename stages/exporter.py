"""One entry of the eager model as an ONNX graph: `torch.onnx`'s dynamo exporter, and a clean-up after it."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from hstu.model import HSTU, history_from_feeds
from hstu.signature import Entry, EntryName, entry
from stages.entry_check import random_feeds
from stages.onnx_files import WeightsWriter, check_interface, move_weights

_PREFIX = "model."  # the attribute of EntryModule; torch puts it before every name
_TRACED_LENGTHS = [3, 2, 5, 4]  # any sizes above 1 do: no dimension of a letter is specialised


class EntryModule(nn.Module):
    """One entry of the model as a module of its own, with the signature's inputs."""

    def __init__(self, model: HSTU, name: EntryName) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, feeds: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The entry's outputs, in the signature's order."""
        history = history_from_feeds(feeds)
        if self.name == "rank":
            return self.model.rank(history, feeds["candidate_ids"])
        if self.name == "extend":
            return self.model.extend(history, feeds["cache"], feeds["cached_timestamps"], feeds["cached_lengths"])
        return self.model.retrieve(history)


def export_entry(model: HSTU, name: EntryName, *, opset: int, writer: WeightsWriter) -> onnx.ModelProto:
    """The entry's graph with the signature's names, dtypes and dynamic axes; large weights go to `writer`.

    Standard operators only. Weights keep the names of the checkpoint; a node is called
    `<module>/<operator>`, such as `layers.0.attention/Sigmoid_12`, after the module it was traced in.
    """
    signature = entry(model.config, name)
    lengths = [min(length, model.config.max_history) for length in _TRACED_LENGTHS]
    feeds = random_feeds(model.config, name, lengths, num_candidates=6)
    letters = {
        size: torch.export.Dim(size) for spec in signature.inputs for size in spec.shape if isinstance(size, str)
    }
    shapes = {
        spec.name: {axis: letters[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in signature.inputs
    }
    # Sizes 0 and 1 are treated as any other (otherwise a graph is traced that holds from size 2 on).
    with _quiet(), torch.fx.experimental._config.patch(backed_size_oblivious=True):
        traced = torch.export.export(
            EntryModule(model, name).eval(),
            ({spec.name: torch.as_tensor(feeds[spec.name]) for spec in signature.inputs},),
            dynamic_shapes=(shapes,),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=opset,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            optimize=False,
            verbose=False,
        )
    # Weights stay as they are in the checkpoint: whether to fold what is computed from them is surgery's choice.
    parameters = set(traced.state_dict)
    optimizer.optimize_ir(
        program.model,
        should_fold=lambda node: False if any(v is not None and v.name in parameters for v in node.inputs) else None,
    )
    move_weights(program.model, writer)
    graph = _cleaned(ir.to_proto(program.model), signature)
    check_interface(graph, signature)
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about itself: an own deprecated call, and packages that are not here."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)


def _cleaned(model: onnx.ModelProto, signature: Entry) -> onnx.ModelProto:
    """The model without traces of the run that made it: names without prefix, axes as letters, shapes inferred."""
    graph = model.graph
    scopes: dict[str, str] = {}  # of the node that produced a tensor
    for node in graph.node:
        scope = _scope(node)
        if scope is None:  # the exporter loses it for operators with several outputs
            scope = next((scopes[name] for name in node.input if name in scopes), "")
        scopes |= dict.fromkeys(node.output, scope)
        node.name = f"{scope}/{node.name.removeprefix('node_')}"
        node.ClearField("doc_string")
        del node.metadata_props[:]
    for node in graph.node:
        node.input[:] = [name.removeprefix(_PREFIX) for name in node.input]
        node.output[:] = [name.removeprefix(_PREFIX) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = tensor.name.removeprefix(_PREFIX)
        tensor.ClearField("doc_string")
        del tensor.metadata_props[:]
    _name_axes(graph, signature)
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    for field in ("producer_name", "producer_version", "doc_string"):
        model.ClearField(field)
    graph.ClearField("doc_string")
    graph.name = signature.name
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def _scope(node: onnx.NodeProto) -> str | None:
    """The module a node was traced in, such as "layers.0.attention"; "" for the model itself, None when not known."""
    for prop in node.metadata_props:
        if prop.key == "pkg.torch.onnx.name_scopes":
            modules: list[str] = ast.literal_eval(prop.value)[:-1]  # the last is the operator's own name
            return modules[-1].removeprefix(_PREFIX) if modules and modules[-1].startswith(_PREFIX) else ""
    return None


def _name_axes(graph: onnx.GraphProto, signature: Entry) -> None:
    """Dynamic axes carry the signature's letters; one that the exporter made static stays so and is found out."""
    letters: dict[str, str] = {}
    for value, spec in zip([*graph.input, *graph.output], [*signature.inputs, *signature.outputs], strict=True):
        value.ClearField("metadata_props")
        for axis, letter in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if axis.dim_param and isinstance(letter, str):
                axis.dim_param = letters.setdefault(axis.dim_param, letter)
