"""Each fault is planted into a sound model and found; the sound model has none."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from onnx import helper

from hstu.artifact import Artifact
from stages.passes.lint import lint
from tests.stages.passes.test_functions import model_of

FORMALS = ["uvqk", "buckets", "lengths", "position_bias", "time_bias"]
P = "HSTUAttention."


def sound() -> onnx.ModelProto:
    return model_of("HSTUAttention", FORMALS)


def node_of(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(node for node in model.functions[0].node if P + output in node.output)


def rename(function: onnx.FunctionProto, old: str, new: str) -> None:
    for names in [function.input, *(f for node in function.node for f in (node.input, node.output))]:
        names[:] = [new if name == old else name for name in names]


def formal_without_prefix(model: onnx.ModelProto) -> None:
    rename(model.functions[0], P + "lengths", "lengths")


def internal_without_prefix(model: onnx.ModelProto) -> None:
    rename(model.functions[0], P + "scores", "scores")


def outer_tensor_with_prefix(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[0].output[0] = P + "out"


def named_like_an_operator(model: onnx.ModelProto) -> None:
    function = model.functions[0]
    for name in {name for node in function.node for name in (*node.input, *node.output)} | set(function.input):
        rename(function, name, name.replace(P, "Attention."))
    function.output[0] = function.output[0].replace(P, "Attention.")
    function.name = model.graph.node[0].op_type = "Attention"


def fixed_float_constant(model: onnx.ModelProto) -> None:
    function = model.functions[0]
    scores = node_of(model, "scores_gate")
    index = list(function.node).index(scores)
    nodes = [helper.make_node("Constant", [], [P + "half"], name="half", value_float=0.5),
             helper.make_node("Mul", [P + "scores", P + "half"], [P + "halved"], name="halved")]  # fmt: skip
    rest = [*function.node[:index], *nodes, *function.node[index:]]
    scores.input[0] = P + "halved"
    del function.node[:]
    function.node.extend(rest)


def narrow_layer_norm(model: onnx.ModelProto) -> None:
    node_of(model, "normed").input[0] = P + "flat"


def wide_result_of_layer_norm(model: onnx.ModelProto) -> None:
    node_of(model, "gated").input[1] = P + "normed"


def mask_of_fixed_type(model: onnx.ModelProto) -> None:
    node = node_of(model, "mask")
    node.op_type = "Cast"
    del node.input[1]
    node.attribute.append(helper.make_attribute("to", onnx.TensorProto.FLOAT))


def other_function_opset(model: onnx.ModelProto) -> None:
    model.functions[0].opset_import[0].version = 21


def domain_not_imported(model: onnx.ModelProto) -> None:
    del model.opset_import[1]


def unknown_function(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "HSTUAttentionV2"


def wrong_arity(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[-1]


def missing_attribute(model: onnx.ModelProto) -> None:
    del model.graph.node[0].attribute[0]


def function_defined_twice(model: onnx.ModelProto) -> None:
    model.functions.append(model.functions[0])


def tensor_defined_twice(model: onnx.ModelProto) -> None:
    node = model.graph.node.add()
    node.CopyFrom(model.graph.node[0])
    node.name = "another"


def node_name_twice(model: onnx.ModelProto) -> None:
    node_of(model, "q").name = node_of(model, "k").name


def undefined_input(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "uvqkk"


def unread_node(model: onnx.ModelProto) -> None:
    model.functions[0].node.append(helper.make_node("Neg", [P + "uvqk"], [P + "unread"], name="unread"))


def unread_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("left", onnx.TensorProto.FLOAT, [1], [1.0]))


def unsorted(model: onnx.ModelProto) -> None:
    nodes = list(model.functions[0].node)
    del model.functions[0].node[:]
    model.functions[0].node.extend([*nodes[5:], *nodes[:5]])


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (formal_without_prefix, "function-names: function hstu::HSTUAttention: tensor 'lengths' does not begin"),
        (internal_without_prefix, "function-names: function hstu::HSTUAttention: tensor 'scores' does not begin"),
        (outer_tensor_with_prefix, "function-names: graph: tensor 'HSTUAttention.out' begins with"),
        (named_like_an_operator, "builtin-name: function hstu::Attention: an operator has this name"),
        (fixed_float_constant, "'HSTUAttention.half': read by Mul without CastLike"),
        (narrow_layer_norm, "'HSTUAttention.normed': the LayerNormalization does not read Cast(to=FLOAT)"),
        (wide_result_of_layer_norm, "'HSTUAttention.normed': the LayerNormalization's result is used in fp32"),
        (mask_of_fixed_type, "'HSTUAttention.mask': cast to a fixed float type"),
        (other_function_opset, "opset: function hstu::HSTUAttention: imports '' 21, the model 20"),
        (domain_not_imported, "opset: graph: uses domain 'hstu' without importing it"),
        (unknown_function, "call: graph, node 'call': there is no function hstu::HSTUAttentionV2"),
        (wrong_arity, "call: graph, node 'call': 4 inputs and 1 outputs, defined with 5 and 1"),
        (missing_attribute, "call: graph, node 'call': lacks attributes ['"),
        (function_defined_twice, "call: hstu::HSTUAttention: defined 2 times"),
        (tensor_defined_twice, "duplicate: graph: tensor name 'out' is used twice"),
        (node_name_twice, "duplicate: function hstu::HSTUAttention: node name 'HSTUAttention.k/Transpose'"),
        (undefined_input, "dangling: graph: tensor 'uvqkk' is read and never defined"),
        (unread_node, "dangling: function hstu::HSTUAttention: nothing reads node 'unread'"),
        (unread_initializer, "dangling: graph: nothing reads initializer 'left'"),
        (unsorted, "order: function hstu::HSTUAttention: node"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_planted_fault_is_found(plant: Callable[[onnx.ModelProto], None], expected: str) -> None:
    model = sound()
    assert lint(model) == []
    plant(model)
    findings = [str(finding) for finding in lint(model)]
    assert any(expected in finding for finding in findings), findings


def test_a_function_nobody_calls_is_found() -> None:
    model = sound()
    model.functions.append(model_of("HSTUQueryAttention", []).functions[0])
    assert [str(f) for f in lint(model)] == ["call: hstu::HSTUQueryAttention: never called"]


def test_exported_and_surgered_graphs_are_clean(exported: Artifact, surgered: Artifact) -> None:
    for artifact in (exported, surgered):
        for name in ("retrieve", "rank"):
            assert lint(onnx.load(artifact.file(f"{name}.onnx"), load_external_data=False)) == []
