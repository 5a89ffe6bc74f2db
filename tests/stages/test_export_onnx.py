"""The exported graphs: interface, every corner of the dynamic shapes, shared weights, the same bytes again."""

from __future__ import annotations

import re
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
from stages import entry_check, export_onnx, exporter, onnx_files
from tests.models import TINY, TINY_RESEARCH, random_candidates, random_histories, random_model, write_checkpoint
from tests.stages.conftest import export


@pytest.mark.parametrize("lengths", [[1], [0], [2, 2], [20], [3, 20, 1], [5, 0, 19, 20, 20, 1, 2]])
@pytest.mark.parametrize("num_candidates", [1, 2, 9])
def test_entries_equal_eager_on_every_shape(exported: Artifact, lengths: list[int], num_candidates: int) -> None:
    eager = TorchEngine(random_model(), threads=1)
    histories = random_histories(TINY, lengths=lengths, seed=len(lengths))
    feeds: dict[str, Any] = dict(histories.feeds(TINY))
    candidates = random_candidates(TINY, num_users=len(lengths), num_candidates=num_candidates)
    for name, inputs in (("retrieve", feeds), ("rank", feeds | {"candidate_ids": candidates})):
        got = entry_check.onnxruntime_entry(exported.file(f"{name}.onnx"))(inputs)
        expected = eager.run(name, inputs)  # type: ignore[arg-type]
        assert {n: (v.dtype, v.shape) for n, v in got.items()} == {n: (v.dtype, v.shape) for n, v in expected.items()}
        assert entry_check.worst_error(expected, got) <= 1e-6


def test_graphs_have_the_signature_and_standard_operators(exported: Artifact) -> None:
    for name in ("retrieve", "rank"):
        model = onnx.load(exported.file(f"{name}.onnx"), load_external_data=False)
        onnx_files.check_interface(model, entry(TINY, name))  # type: ignore[arg-type]
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions


def test_check_interface_finds_a_static_axis(exported: Artifact) -> None:
    model = onnx.load(exported.file("retrieve.onnx"), load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 20
    with pytest.raises(GateError, match=r"item_ids int64 \['B', 20\]"):
        onnx_files.check_interface(model, entry(TINY, "retrieve"))


def test_every_large_weight_is_stored_once(exported: Artifact) -> None:
    weights = exported.file(onnx_files.WEIGHTS).read_bytes()
    model = random_model()
    for name, value in model.state_dict().items():
        assert weights.count(value.numpy().tobytes()) == (1 if value.nbytes > onnx_files.INLINE_BYTES else 0), name
    names = {
        tensor.name
        for entry_name in ("retrieve", "rank")
        for tensor in onnx.load(exported.file(f"{entry_name}.onnx"), load_external_data=False).graph.initializer
    }
    assert set(model.state_dict()) <= names  # weights keep the checkpoint's names


def test_nodes_are_named_after_their_module_and_nothing_of_the_machine(exported: Artifact) -> None:
    model = onnx.load(exported.file("rank.onnx"), load_external_data=False)
    scopes = {onnx_files.scope(node.name) for node in model.graph.node}
    assert {f"layers.{i}.{part}" for i in (0, 1) for part in ("uvqk", "output", "candidate_attention")} <= scopes
    assert "layers.0.attention" in scopes
    for name in ("retrieve", "rank"):
        data = exported.file(f"{name}.onnx").read_bytes()
        assert b"pkg." not in data
        assert not re.search(rb"/[a-z]+/|\.py\b|stack_trace|pytorch|_torch", data)


def test_same_checkpoint_same_bytes(exported: Artifact, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "elsewhere")
    assert export(checkpoint, tmp_path / "again").manifest["files"] == exported.manifest["files"]


def test_other_variants_export(variant: tuple[HSTU, Artifact]) -> None:
    model, artifact = variant
    assert ("rank.onnx" in artifact.manifest["files"]) == bool(model.config.tasks)
    feeds = random_histories(model.config, seed=3).feeds(model.config)
    got = entry_check.onnxruntime_entry(artifact.file("retrieve.onnx"))(feeds)
    assert entry_check.worst_error(TorchEngine(model, threads=1).run("retrieve", feeds), got) <= 1e-6


def test_a_wrong_graph_is_refused_with_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", random_model(TINY_RESEARCH))
    right = exporter.export_entry

    def wrong(model: Any, name: Any, **options: Any) -> onnx.ModelProto:
        graph = right(model, name, **options)
        bias = next(t for t in graph.graph.initializer if t.name == "layers.1.output.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1e-3), bias.name))
        return graph

    monkeypatch.setattr(exporter, "export_entry", wrong)
    with pytest.raises(GateError, match=r"(?s)'retrieve'.*max abs error \d.*at most 1e-05"):
        export(checkpoint, tmp_path / "export")


def test_worst_error_forgives_ties_and_nothing_else() -> None:
    scores = np.array([[0.9, 0.5, 0.5, 0.1]], dtype=np.float32)
    expected = {"top_item_ids": np.array([[3, 7, 8, 2]]), "top_scores": scores}
    tie = {"top_item_ids": np.array([[3, 8, 7, 4]]), "top_scores": scores}
    assert entry_check.worst_error(expected, tie) == 0.0
    wrong_item = {"top_item_ids": np.array([[4, 7, 8, 2]]), "top_scores": scores}
    assert entry_check.worst_error(expected, wrong_item) == pytest.approx(0.8)
    twice = {"top_item_ids": np.array([[3, 7, 7, 2]]), "top_scores": scores}
    assert entry_check.worst_error(expected, twice) == float("inf")
    nan = {"top_item_ids": expected["top_item_ids"], "top_scores": scores * np.float32("nan")}
    assert entry_check.worst_error(expected, nan) == float("inf")


def test_worst_error_is_relative_where_an_output_is_larger_than_one() -> None:
    """Rows of a cache are: of the same relative error, a large one is no more wrong than a small one."""
    rows, small = np.array([5.0, -0.5], np.float32), np.array([0.5, -0.05], np.float32)
    error = np.array([0.0, 1e-2], np.float32)
    assert entry_check.worst_error({"cache_rows": rows}, {"cache_rows": rows + error}) == pytest.approx(2e-3, rel=1e-4)
    assert entry_check.worst_error({"top_scores": small}, {"top_scores": small + error}) == pytest.approx(
        1e-2, rel=1e-4
    )
    broken = {"cache_rows": rows * np.float32("nan")}
    assert entry_check.worst_error({"cache_rows": rows}, broken) == float("inf")


def test_opset_out_of_range() -> None:
    with pytest.raises(ParameterError, match="opset"):
        export_onnx.ExportOnnxParams(opset=17, check_seed=0)
