"""What each pass leaves in the graph, and that it refuses a graph it does not know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from hstu.artifact import Artifact
from hstu.errors import GateError
from stages import entry_check, onnx_files, surgery
from stages.passes import attention_function, causal_tiles, functions, item_head
from stages.passes.lint import lint
from tests.models import TINY, random_model


@pytest.fixture
def models(exported: Artifact) -> dict[str, onnx.ModelProto]:
    """The exported graphs, fresh."""
    return onnx_files.read_models(exported.path, ["retrieve", "rank"])


def apply(model: onnx.ModelProto, *passes: str) -> onnx.ModelProto:
    for name in passes:
        model = surgery.apply_pass(name, model, TINY)
    return model


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_fold_constants_transposes_weights_once(models: dict[str, onnx.ModelProto]) -> None:
    model = apply(models["rank"], "fold_constants")
    assert not [n for n in model.graph.node if n.op_type == "Transpose"]
    weight = random_model().layers[0].uvqk.weight.numpy()
    np.testing.assert_array_equal(weights(model)["layers.0.uvqk.weight.transposed"], weight.T)
    assert "layers.0.uvqk.weight" not in weights(model)


def test_item_head_folds_norms_and_keeps_the_table(models: dict[str, onnx.ModelProto]) -> None:
    model = apply(models["retrieve"], "item_head")
    table = random_model().item_embedding.weight.numpy()
    np.testing.assert_allclose(
        weights(model)["item_head.reciprocal_norms"], 1 / np.linalg.norm(table[1:], axis=1), rtol=1e-6
    )
    assert sum(value.size >= TINY.num_items * TINY.embedding_dim for value in weights(model).values()) == 1
    untouched = apply(models["rank"], "item_head").graph.node
    assert sorted(n.name for n in untouched) == sorted(n.name for n in models["rank"].graph.node)


def test_plain_gather_leaves_no_look_up_by_gathernd(models: dict[str, onnx.ModelProto]) -> None:
    for model in models.values():
        before = sum(n.op_type == "GatherND" for n in model.graph.node)
        after = apply(model, "plain_gather")
        assert before > 0
        assert not [n for n in after.graph.node if n.op_type == "GatherND"]


def test_attention_function_takes_the_whole_attention(models: dict[str, onnx.ModelProto]) -> None:
    for model in models.values():
        left = [n for n in apply(model, "attention_function").graph.node if "attention" in n.name]
        assert {n.domain for n in left} == {functions.DOMAIN}


ALL_BUT_PACKING = tuple(name for name in surgery.MODULES if name != "packing")


@pytest.mark.parametrize("passes", [("fold_constants", "attention_function"), ALL_BUT_PACKING])
@pytest.mark.parametrize("entry", ["retrieve", "rank", "extend"])
def test_packing_takes_padding_out_of_every_product(exported: Artifact, entry: str, passes: tuple[str, ...]) -> None:
    before = apply(onnx_files.read_models(exported.path, [entry])[entry], *passes)
    after = apply(before, "packing")
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in after.graph.value_info}
    products = [n for n in after.graph.node if n.op_type == "MatMul" and (".uvqk/" in n.name or ".output/" in n.name)]
    packed = [n for n in products if shapes[n.output[0]][0] == 1]
    others = 2 if "last_position" in passes and entry != "rank" else 0  # uq and W_o of the last layer
    of_candidates = 2 * TINY.num_layers if entry == "rank" else 0
    assert len(packed) == len(products) - others - of_candidates
    assert {n.name: n.input[1] for n in products} == {
        n.name: n.input[1] for n in before.graph.node if n.op_type == "MatMul" and n.name in {p.name for p in products}
    }
    made = {name for n in after.graph.node for name in n.output}
    assert {"packing.rows", "packing.places"} <= made


def test_causal_tiles_are_for_long_histories(models: dict[str, onnx.ModelProto]) -> None:
    model = apply(models["retrieve"], "attention_function")
    assert apply(model, "causal_tiles").functions == model.functions
    tiled = surgery.apply_pass("causal_tiles", model, replace(TINY, max_history=causal_tiles.LONG))
    function = next(f for f in tiled.functions if f.name == "HSTUAttention")
    assert sum(n.op_type == "MatMul" for n in function.node) == 2 * causal_tiles.TILES
    assert lint(tiled) == []


@pytest.mark.parametrize("lengths", [[1], [3, 0, 7], [8, 9, 1], [20, 19, 13]])
def test_causal_tiles_answer_as_the_whole(
    models: dict[str, onnx.ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    monkeypatch.setattr(causal_tiles, "LONG", 1)
    feeds = entry_check.random_feeds(TINY, "retrieve", lengths)
    answers = []
    whole = apply(models["retrieve"], "attention_function")
    for model in (whole, apply(whole, "causal_tiles")):
        path = tmp_path / f"{len(answers)}.onnx"
        onnx.save(model, path)
        answers.append(entry_check.onnxruntime_entry(path)(feeds))
    assert entry_check.worst_error(*answers) <= 1e-6


def test_attention_function_refuses_an_input_it_does_not_know(models: dict[str, onnx.ModelProto]) -> None:
    graph = gs.import_onnx(models["retrieve"])
    scores = next(n for n in graph.nodes if n.op == "Einsum")
    outside = next(n for n in graph.nodes if n.name.startswith("position_embedding")).outputs[0]
    scores.inputs[0] = outside
    with pytest.raises(GateError, match=r"layers\.0\.attention reads 'embedding"):
        attention_function.apply(graph, TINY)


def test_passes_refuse_a_graph_without_their_pattern(models: dict[str, onnx.ModelProto]) -> None:
    graph = gs.import_onnx(models["retrieve"])
    next(n for n in graph.nodes if n.op == "TopK").op = "Identity"
    with pytest.raises(GateError, match=r"(?s)one TopK.*0 found.*exactly one"):
        item_head.apply(graph, TINY)


def test_last_position_in_rank_projects_keys_and_values_alone(models: dict[str, onnx.ModelProto]) -> None:
    model = apply(models["rank"], "fold_constants", "attention_function", "last_position")
    last = f"layers.{TINY.num_layers - 1}"
    stored = weights(model)
    weight = random_model().layers[-1].uvqk.weight.numpy().T
    hv, hqk = TINY.num_heads * TINY.v_dim, TINY.num_heads * TINY.qk_dim
    kv = stored[f"{last}.uvqk.weight.transposed.kv"]
    np.testing.assert_array_equal(kv, np.concatenate([weight[:, -hqk:], weight[:, hv : 2 * hv]], axis=1))
    node = next(n for n in model.graph.node if n.name == f"{last}.candidate_attention/HSTUCandidateAttention")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (attributes["k_offset"], attributes["v_offset"]) == (0, hqk)
    # No history attention, projection or output of the last layer is left.
    assert not [n for n in model.graph.node if n.name.startswith(f"{last}.attention")]
