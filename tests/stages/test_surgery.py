"""The rewritten graphs: the same answers, one function for all layers, nothing stored twice, mistakes refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hstu.artifact import Artifact
from hstu.errors import GateError, ParameterError
from hstu.model import HSTU
from hstu.signature import entry
from serving.engines.torch import TorchEngine
from stages import entry_check, onnx_files, surgery
from stages.passes import functions, item_head
from stages.passes.lint import lint
from tests.models import TINY, random_candidates, random_histories, random_model
from tests.stages.conftest import operate

LAST = TINY.num_layers - 1


def load(artifact: Artifact, name: str) -> onnx.ModelProto:
    return onnx.load(artifact.file(f"{name}.onnx"), load_external_data=False)


def calls(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(onnx_files.scope(n.name), n.op_type) for n in model.graph.node if n.domain == functions.DOMAIN]


@pytest.mark.parametrize("lengths", [[1], [0], [2, 2], [20], [3, 20, 1], [5, 0, 19, 20, 20, 1, 2]])
@pytest.mark.parametrize("num_candidates", [1, 9])
def test_entries_equal_eager_on_every_shape(surgered: Artifact, lengths: list[int], num_candidates: int) -> None:
    eager = TorchEngine(random_model(), threads=1)
    histories = random_histories(TINY, lengths=lengths, seed=7)
    feeds: dict[str, Any] = dict(histories.feeds(TINY))
    candidates = random_candidates(TINY, num_users=len(lengths), num_candidates=num_candidates)
    for name, inputs in (("retrieve", feeds), ("rank", feeds | {"candidate_ids": candidates})):
        for file in (f"{name}.onnx", f"{name}.packed.onnx"):
            got = entry_check.onnxruntime_entry(surgered.file(file))(inputs)
            assert entry_check.worst_error(eager.run(name, inputs), got) <= 1e-6  # type: ignore[arg-type]


def test_what_stands_after_the_end_of_a_history_does_not_matter(surgered: Artifact) -> None:
    histories = random_histories(TINY, lengths=[3, 12, 0])
    feeds: dict[str, Any] = dict(histories.feeds(TINY))
    after = np.arange(12) >= histories.lengths[:, None]
    garbage = {name: feeds[name].copy() for name in ("item_ids", "actions", "timestamps")}
    garbage["item_ids"][after], garbage["actions"][after], garbage["timestamps"][after] = 5, 2, 10**12
    candidates = random_candidates(TINY, num_users=3, num_candidates=4)
    for name, inputs in (("retrieve", feeds), ("rank", feeds | {"candidate_ids": candidates})):
        run = entry_check.onnxruntime_entry(surgered.file(f"{name}.onnx"))
        assert entry_check.worst_error(run(inputs), run(inputs | garbage)) <= 1e-7


def test_every_layer_calls_one_definition(surgered: Artifact) -> None:
    retrieve, rank = load(surgered, "retrieve"), load(surgered, "rank")
    assert calls(retrieve) == [("layers.0.attention", "HSTUAttention"), ("layers.1.attention", "HSTUQueryAttention")]
    assert sorted(calls(rank)) == [
        ("layers.0.attention", "HSTUAttention"),
        ("layers.0.candidate_attention", "HSTUCandidateAttention"),
        ("layers.1.candidate_attention", "HSTUCandidateAttention"),
    ]
    for model in (retrieve, rank):
        assert sorted(f.name for f in model.functions) == sorted({op for _, op in calls(model)})
        for node in model.graph.node:
            if node.domain == functions.DOMAIN:
                attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                assert attributes.items() >= {"num_heads": 2, "qk_dim": 6, "v_dim": 8, "max_length": 31}.items()
                layer = ".".join(node.name.split(".")[:2])
                tables = [f"{layer}.attention.{table}" for table in ("position_bias", "time_bias")]
                assert list(node.input)[-2:] == tables


def test_the_last_layer_is_for_one_position(surgered: Artifact) -> None:
    shapes = {t.name: list(t.dims) for t in load(surgered, "retrieve").graph.initializer}
    half = TINY.uvqk_dim // 2
    weight = f"layers.{LAST}.uvqk.weight.transposed"
    assert shapes[f"{weight}.uq"] == shapes[f"{weight}.kv"] == [TINY.embedding_dim, half]
    assert weight not in shapes
    model = load(surgered, "retrieve")
    sizes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    output = next(n for n in model.graph.node if n.op_type == "MatMul" and n.name.startswith(f"layers.{LAST}.output"))
    assert sizes[output.output[0]][1:] == [1, TINY.embedding_dim]


def test_the_item_table_is_stored_once_and_only_with_item_head(
    surgered: Artifact, exported: Artifact, tmp_path: Path
) -> None:
    table = random_model().item_embedding.weight
    assert surgered.file(onnx_files.WEIGHTS).read_bytes().count(table.numpy().tobytes()) == 1
    without = operate(exported, tmp_path / "without", ("fold_constants",))
    difference = without.file(onnx_files.WEIGHTS).stat().st_size - surgered.file(onnx_files.WEIGHTS).stat().st_size
    slices = TINY.embedding_dim * TINY.uvqk_dim * 4 * 2  # what last_position adds, at most
    assert difference > table.nbytes - slices


def test_artifact_tells_its_passes(surgered: Artifact) -> None:
    assert set(surgered.manifest["files"]) == {
        "retrieve.onnx",
        "rank.onnx",
        "extend.onnx",
        "retrieve.packed.onnx",
        "rank.packed.onnx",
        "extend.packed.onnx",
        "weights.bin",
        "config.json",
        "passes.json",
    }
    passes = json.loads(surgered.file("passes.json").read_text())["passes"]
    assert [entry["name"] for entry in passes] == list(surgery.MODULES)
    assert all(len(entry["reason"]) > 20 for entry in passes)


def test_same_input_same_bytes(surgered: Artifact, exported: Artifact, tmp_path: Path) -> None:
    assert operate(exported, tmp_path / "again").manifest["files"] == surgered.manifest["files"]


@pytest.mark.parametrize("passes", [(), ("item_head",), ("attention_function",), ("fold_constants", "plain_gather")])
def test_passes_may_be_left_out(exported: Artifact, tmp_path: Path, passes: tuple[str, ...]) -> None:
    artifact = operate(exported, tmp_path / "some", passes)
    assert not list(artifact.path.glob("*.packed.onnx"))
    for name in ("retrieve", "rank"):
        assert lint(load(artifact, name)) == []
        onnx_files.check_interface(load(artifact, name), entry(TINY, name))  # type: ignore[arg-type]


def test_other_variants(variant: tuple[HSTU, Artifact], tmp_path: Path) -> None:
    model, exported = variant
    artifact = operate(exported, tmp_path / "surgery")
    feeds = random_histories(model.config, seed=3).feeds(model.config)
    got = entry_check.onnxruntime_entry(artifact.file("retrieve.onnx"))(feeds)
    assert entry_check.worst_error(TorchEngine(model, threads=1).run("retrieve", feeds), got) <= 1e-6


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (("last_position", "fold_constants", "attention_function"), "order"),
        (("fold_constants", "fold_constants"), "order"),
        (("fold_constants", "last_position"), "needs another pass"),
    ],
)
def test_pass_lists_that_make_no_sense(passes: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        surgery.SurgeryParams(passes=passes, check_seed=0)


def test_a_pass_that_changes_answers_is_refused(
    exported: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_head, "L2_EPS", 3.0)  # norms below 3 are no longer divided by
    with pytest.raises(GateError, match=r"(?s)pass item_head.*'retrieve'.*max abs error \d"):
        operate(exported, tmp_path / "wrong")


def test_a_pass_that_leaves_a_trap_is_refused(
    exported: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = functions.attention_function

    def careless(*args: Any) -> onnx.FunctionProto:
        function = right(*args)
        for node in function.node:
            node.input[:] = [name.replace("HSTUAttention.uvqk", "uvqk") for name in node.input]
            node.output[:] = [name.replace("HSTUAttention.uvqk", "uvqk") for name in node.output]
        function.input[:] = [name.replace("HSTUAttention.uvqk", "uvqk") for name in function.input]
        return function

    monkeypatch.setattr(functions, "attention_function", careless)
    with pytest.raises(GateError, match=r"(?s)pass attention_function: the linter.*'uvqk' does not begin with"):
        operate(exported, tmp_path / "wrong", ("attention_function",))


def test_tensorrt_rtx_parses_and_builds_it(surgered: Artifact) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    sizes = {"B": (1, 2, 4), "L": (1, 10, 20), "C": (1, 4, 8)}
    for name in ("retrieve", "rank"):
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
        parsed = parser.parse_from_file(str(surgered.file(f"{name}.onnx")))
        assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
        profile = builder.create_optimization_profile()
        for spec in entry(TINY, name).inputs:  # type: ignore[arg-type]
            profile.set_shape(spec.name, *zip(*(sizes[str(letter)] for letter in spec.shape), strict=True))
        config = builder.create_builder_config()
        config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None
