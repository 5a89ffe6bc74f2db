"""Finds the parts of an exported graph by the module names that its nodes carry, and builds new nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from hstu.errors import GateError
from stages.onnx_files import scope

T = TypeVar("T")


def nodes_of(graph: gs.Graph, module: str, op: str) -> list[gs.Node]:
    """The nodes of an operator that were traced in a module, such as "layers.0.uvqk"."""
    return [node for node in graph.nodes if node.op == op and scope(node.name) == module]


def only(found: Iterable[T], what: str) -> T:
    """The one element of `found`; GateError when there is none or more than one."""
    elements = list(found)
    if len(elements) != 1:
        raise GateError(
            f"surgery: the graph is not as the exporter is known to write it: {what}",
            got=f"{len(elements)} found",
            expected="exactly one",
            fix="leave the pass out (surgery.passes), and report the version of torch",
        )
    return elements[0]


def producer(tensor: gs.Tensor, op: str) -> gs.Node:
    """The node that makes `tensor`, which must be of that operator."""
    return only((node for node in tensor.inputs if node.op == op), f"{tensor.name} comes from a {op}")


def constant(graph: gs.Graph, name: str) -> gs.Constant:
    """The stored tensor of that name."""
    return only((t for n, t in graph.tensors().items() if n == name and isinstance(t, gs.Constant)), f"constant {name}")


def add(
    graph: gs.Graph, op: str, name: str, inputs: Sequence[gs.Tensor | npt.NDArray[Any]], **options: Any
) -> gs.Variable:
    """The output, called `name`, of a new node; arrays among the inputs become constants `<name>.<index>`."""
    tensors = [
        gs.Constant(f"{name}.{index}", value) if isinstance(value, np.ndarray) else value
        for index, value in enumerate(inputs)
    ]
    output = gs.Variable(name)
    module, _, _ = name.rpartition(".")
    graph.nodes.append(
        gs.Node(
            op=op, name=f"{module}/{op}:{name.removeprefix(module + '.')}", inputs=tensors, outputs=[output], **options
        )
    )
    return output


def replace_uses(old: gs.Tensor, new: gs.Tensor) -> None:
    """Every node that read `old` reads `new`."""
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
