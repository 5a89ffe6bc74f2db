"""The matrix products with weights: which there are in a graph, and what each is for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from hstu.errors import ParameterError
from stages.onnx_files import scope

ROLES = ("uvqk", "output", "hidden", "logits", "item_head")


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One product by a weight: MatMul by [K, N], or the item head's Gemm by a transposed [N, K].

    `name` is the module's, as in the checkpoint (layers.3.output), with `#1` and so on where a module is
    applied once more in a graph (to candidates beside the history, or in parts); `item_head` is the item head.
    """

    name: str
    node: ir.Node

    @property
    def module(self) -> str:
        """The name without the count."""
        return self.name.partition("#")[0]

    @property
    def role(self) -> str:
        """The last part of the module's name, one of ROLES."""
        return self.module.rpartition(".")[2]

    @property
    def input(self) -> ir.Value:
        """What is multiplied, float32 [.., K]."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> ir.Value:
        """Initializer, float32."""
        value = self.node.inputs[1]
        assert value is not None
        return value


def find_linears(model: ir.Model) -> list[Linear]:
    """Every linear of the main graph, in the order of the graph."""
    found: list[Linear] = []
    seen: dict[str, int] = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None or not node.inputs[1].is_initializer():
            continue
        module = scope(node.name or "") or "item_head"  # only the scores of all items belong to no module
        count = seen.get(module, 0)
        seen[module] = count + 1
        found.append(Linear(name=f"{module}#{count}" if count else module, node=node))
    return found


def matches(linear: Linear, patterns: Iterable[str]) -> bool:
    """Whether a pattern names the linear's role (output) or its module (layers.3.output)."""
    return any(pattern in (linear.role, linear.module) for pattern in patterns)


def require_known(patterns: Iterable[str], linears: Iterable[Linear], *, parameter: str) -> None:
    """ParameterError when a pattern names no role and no linear of the model."""
    modules = {linear.module for linear in linears}
    for pattern in patterns:
        if pattern not in {*ROLES, *modules}:
            raise ParameterError(
                f"{parameter}: no such linear {pattern!r}", expected=", ".join((*ROLES, *sorted(modules)))
            )
