"""Faults of an ONNX model that checkers let through and compilers turn into wrong answers.

The first four are traps of NVIDIA's parser and of precision lowering: names of a function that meet names
outside it, a function named like an operator, a float constant that stays fp32 when the data becomes fp16,
a function of another opset. The rest is what a careless rewrite leaves behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx

_FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One fault: the rule it breaks, where, and what is wrong."""

    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.message}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scope:
    """A list of nodes with its own names: the main graph or a function's body."""

    where: str
    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        produced = {name for node in self.nodes for name in node.output}
        return {*self.inputs, *self.constants, *produced} - {""}


def lint(model: onnx.ModelProto) -> list[Finding]:
    """Every fault of the model, in the order of `RULES`; an empty list when there is none."""
    return [finding for rule in RULES for finding in rule(model)]


def function_names(model: onnx.ModelProto) -> Iterator[Finding]:
    """A name inside a function begins with the function's name, and no name outside does.

    NVIDIA's parser binds by name: a formal input that shares the name of a different outer tensor reads that one.
    """
    scopes = _scopes(model)
    for function in model.functions:
        prefix = f"{function.name}."
        for scope in scopes:
            own = scope.where == _where(function)
            for name in sorted(scope.names):
                if name.startswith(prefix) != own:
                    problem = f"does not begin with {prefix!r}" if own else f"begins with {prefix!r}"
                    yield Finding(rule="function-names", where=scope.where, message=f"tensor {name!r} {problem}")


def builtin_names(model: onnx.ModelProto) -> Iterator[Finding]:
    """No function is named like an operator of any domain: it would be imported as that operator."""
    builtin = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    for function in model.functions:
        if function.name in builtin:
            yield Finding(rule="builtin-name", where=_where(function), message="an operator has this name")


def float_constants(model: onnx.ModelProto) -> Iterator[Finding]:
    """In a function a float constant reaches the data through CastLike, or stays within a LayerNormalization in fp32.

    That LayerNormalization reads Cast(to=FLOAT) and is read by CastLike alone; no other Cast to a float type is there.
    """
    for function in model.functions:
        consumers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in function.node:
            for index, name in enumerate(node.input):
                consumers.setdefault(name, []).append((node, index))
        producers = {name: node for node in function.node for name in node.output}

        def finding(name: str, message: str, function: onnx.FunctionProto = function) -> Finding:
            return Finding(rule="float-constant", where=_where(function), message=f"tensor {name!r}: {message}")

        for node in function.node:
            name = node.output[0]
            readers = consumers.get(name, [])
            if _float_constant(node):
                for reader, index in readers:
                    if (reader.op_type, index) != ("CastLike", 0) and reader.op_type != "LayerNormalization":
                        yield finding(name, f"read by {reader.op_type} without CastLike")
            elif node.op_type == "Cast" and _attribute(node, "to") in _FLOATS:
                if any(reader.op_type != "LayerNormalization" for reader, _ in readers):
                    yield finding(name, "cast to a fixed float type outside a LayerNormalization")
            elif node.op_type == "LayerNormalization":
                source = producers.get(node.input[0])
                if source is None or source.op_type != "Cast" or _attribute(source, "to") != onnx.TensorProto.FLOAT:
                    yield finding(name, "the LayerNormalization does not read Cast(to=FLOAT)")
                if any((reader.op_type, index) != ("CastLike", 0) for reader, index in readers):
                    yield finding(name, "the LayerNormalization's result is used in fp32, not through CastLike")


def opsets(model: onnx.ModelProto) -> Iterator[Finding]:
    """Every domain that is used is imported, and functions import exactly the model's versions."""
    imported = {_domain(entry.domain): entry.version for entry in model.opset_import}
    for function in model.functions:
        for entry in function.opset_import:
            if imported.get(_domain(entry.domain)) != entry.version:
                yield Finding(
                    rule="opset",
                    where=_where(function),
                    message=f"imports {entry.domain!r} {entry.version}, "
                    f"the model {imported.get(_domain(entry.domain))}",
                )
    for where, nodes, domains in [
        ("graph", model.graph.node, set(imported)),
        *((_where(f), f.node, {_domain(entry.domain) for entry in f.opset_import}) for f in model.functions),
    ]:
        for domain in sorted({_domain(node.domain) for node in nodes} - domains):
            yield Finding(rule="opset", where=where, message=f"uses domain {domain!r} without importing it")


def calls(model: onnx.ModelProto) -> Iterator[Finding]:
    """A node of a domain of ours calls a function that is there, once, with its inputs, outputs and attributes."""
    defined = {(function.domain, function.name): function for function in model.functions}
    for key, count in Counter((function.domain, function.name) for function in model.functions).items():
        if count > 1:
            yield Finding(rule="call", where="::".join(key), message=f"defined {count} times")
    domains = {function.domain for function in model.functions}
    called = set()
    for scope in _scopes(model):
        for node in scope.nodes:
            key = (node.domain, node.op_type)
            called.add(key)
            if node.domain not in domains:
                continue
            where = f"{scope.where}, node {node.name!r}"
            if key not in defined:
                yield Finding(rule="call", where=where, message=f"there is no function {'::'.join(key)}")
                continue
            function = defined[key]
            if (len(node.input), len(node.output)) != (len(function.input), len(function.output)):
                yield Finding(
                    rule="call",
                    where=where,
                    message=f"{len(node.input)} inputs and {len(node.output)} outputs, "
                    f"defined with {len(function.input)} and {len(function.output)}",
                )
            if missing := sorted(set(function.attribute) - {attribute.name for attribute in node.attribute}):
                yield Finding(rule="call", where=where, message=f"lacks attributes {missing}")
    for key in sorted(defined.keys() - called):
        yield Finding(rule="call", where="::".join(key), message="never called")


def duplicates(model: onnx.ModelProto) -> Iterator[Finding]:
    """Every tensor is defined once and every node has a name of its own."""
    for scope in _scopes(model):
        produced = [name for node in scope.nodes for name in node.output if name]
        for kind, names in (
            ("tensor", [*scope.inputs, *scope.constants, *produced]),
            ("node", [node.name for node in scope.nodes]),
        ):
            for name in _repeated(names):
                yield Finding(rule="duplicate", where=scope.where, message=f"{kind} name {name!r} is used twice")


def dangling(model: onnx.ModelProto) -> Iterator[Finding]:
    """Everything that is read is defined; everything that is computed or stored is read."""
    for scope in _scopes(model):
        read = {name for node in scope.nodes for name in node.input} | set(scope.outputs)
        for name in sorted(read - scope.names - {""}):
            yield Finding(rule="dangling", where=scope.where, message=f"tensor {name!r} is read and never defined")
        for node in scope.nodes:
            if not read & set(node.output):
                yield Finding(rule="dangling", where=scope.where, message=f"nothing reads node {node.name!r}")
        for name in sorted(set(scope.constants) - read):
            yield Finding(rule="dangling", where=scope.where, message=f"nothing reads initializer {name!r}")


def order(model: onnx.ModelProto) -> Iterator[Finding]:
    """Nodes stand after what they read."""
    for scope in _scopes(model):
        defined = {*scope.inputs, *scope.constants, ""}
        known = scope.names
        for node in scope.nodes:
            for name in node.input:
                if name in known and name not in defined:
                    message = f"node {node.name!r} stands before the node that makes its input {name!r}"
                    yield Finding(rule="order", where=scope.where, message=message)
            defined.update(node.output)


RULES: tuple[Callable[[onnx.ModelProto], Iterable[Finding]], ...] = (
    function_names, builtin_names, float_constants, opsets, calls, duplicates, dangling, order,
)  # fmt: skip


def _scopes(model: onnx.ModelProto) -> list[_Scope]:
    graph = model.graph
    main = _Scope(
        where="graph",
        nodes=tuple(graph.node),
        inputs=tuple(value.name for value in graph.input),
        outputs=tuple(value.name for value in graph.output),
        constants=tuple(tensor.name for tensor in graph.initializer),
    )
    bodies = [
        _Scope(
            where=_where(function),
            nodes=tuple(function.node),
            inputs=tuple(function.input),
            outputs=tuple(function.output),
            constants=(),
        )
        for function in model.functions
    ]
    return [main, *bodies]


def _where(function: onnx.FunctionProto) -> str:
    return f"function {function.domain}::{function.name}"


def _domain(name: str) -> str:
    return "" if name in _STANDARD else name


def _attribute(node: onnx.NodeProto, name: str) -> object:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def _float_constant(node: onnx.NodeProto) -> bool:
    if node.op_type == "ConstantOfShape":
        value = _attribute(node, "value")
        return value is None or (isinstance(value, onnx.TensorProto) and value.data_type in _FLOATS)
    if node.op_type != "Constant":
        return False
    return any(
        attribute.name in ("value_float", "value_floats") or attribute.t.data_type in _FLOATS
        for attribute in node.attribute
    )


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
