"""Steps through an OpenVINO graph: where a value comes from, what it is, and who reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from openvino import Type

from serving.engine import Array


def chain(node: Any) -> Iterator[Any]:
    """What a node's first inputs come from, one after the other, as long as each is one of what a Gemm is made of."""
    while node.get_type_name() in ("Multiply", "Slice", "StridedSlice", "Add"):
        node = node.input_value(0).get_node()
        yield node


def source_of(value: Any) -> tuple[Any, set[str]]:
    """Where a value was computed, before casts and quantisation, and which of those it has passed since."""
    passed: set[str] = set()
    while value.get_node().get_type_name() in ("Convert", "FakeQuantize", "Subtract", "Multiply"):
        passed.add(value.get_node().get_type_name())
        value = value.get_node().input_value(0)
    return value, passed


def without_casts(value: Any) -> Any:
    while value.get_node().get_type_name() == "Convert":
        value = value.get_node().input_value(0)
    return value


def constant_name(value: Any) -> str:
    """The name of the constant a value is, whatever type it is cast to; "" when it is none."""
    node = without_casts(value).get_node()
    return str(node.get_friendly_name()) if node.get_type_name() == "Constant" else ""


def data_of(constant: Any) -> Array:
    """A constant's own memory; bfloat16 as uint16."""
    data: Array = constant.data
    return data.view(np.uint16) if constant.get_element_type() == Type.bf16 else data


def replace_value(old: Any, new: Any, name: str) -> None:
    """Whatever reads `old` reads `new`, which has its name if one is given."""
    for reader in old.get_target_inputs():
        reader.replace_source_output(new)
    names = old.get_tensor().get_names()
    if names:
        old.get_tensor().set_names(set())
        new.get_tensor().set_names(names)
    if name:
        new.get_node().set_friendly_name(name)


def ancestors(node: Any) -> set[str]:
    """Names of everything a node is computed from."""
    names: set[str] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current.get_friendly_name() not in names:
            names.add(current.get_friendly_name())
            pending += [value.get_node() for value in current.input_values()]
    return names
