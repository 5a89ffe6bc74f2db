"""The conformance matrix: what is built and what is refused, in one file, resumed and told as a table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from hstu.artifact import Artifact
from hstu.config import HSTUConfig
from hstu.errors import InputError, UsageError
from stages import conformance
from stages.contract import Workspace
from stages.tensorrt.builder import BuildSettings

KEYS = ["model", "entry", "precision", "product", "version", "result", "reason", "engine_sha256"]


@pytest.fixture(scope="module")
def workspace(surgered: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("conformance")
    shutil.copytree(surgered.path, root / "artifacts" / "surgery")
    return Workspace(artifacts=root / "artifacts", reports=root / "reports", values={})


def test_every_entry_is_built_and_reported(workspace: Workspace) -> None:
    conformance.run_conformance(workspace, ["trained"], ["int8", "int8+fp16"])
    rows = json.loads((workspace.reports / conformance.FILE).read_bytes())
    assert [sorted(row) for row in rows] == [sorted(KEYS)] * 6
    assert {(row["entry"], row["precision"]) for row in rows} == {
        (entry, precision) for entry in ("retrieve", "rank", "extend") for precision in ("int8", "int8+fp16")
    }
    assert {(row["result"], row["reason"], row["product"]) for row in rows} == {("built", None, "TensorRT-RTX")}
    assert len({row["engine_sha256"] for row in rows}) == 6
    text = conformance.table_text(conformance.read_rows(workspace.reports / conformance.FILE))
    assert "built, not executed, by TensorRT-RTX" in text


def test_what_is_refused_is_listed_with_nvidias_reason(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.artifacts / "surgery", tmp_path / "artifacts" / "surgery")
    path = tmp_path / "artifacts" / "surgery" / "retrieve.onnx"
    model = onnx.load(path, load_external_data=False)
    position, head = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "Gemm")
    strange = onnx.helper.make_node("Unique", [head.input[0]], ["unique"], name="user/Unique", sorted=1)
    model.graph.node.insert(position, strange)
    count = onnx.helper.make_node("Size", ["unique"], ["count"], name="user/Size")
    one = onnx.helper.make_node("CastLike", ["count", head.input[0]], ["count_f"], name="user/CastLike")
    add = onnx.helper.make_node("Add", [head.input[0], "count_f"], ["changed"], name="user/Add")
    for offset, node in enumerate((count, one, add), start=1):
        model.graph.node.insert(position + offset, node)
    next(n for n in model.graph.node if n.op_type == "Gemm").input[0] = "changed"
    onnx.save(model, path)
    (tmp_path / "artifacts" / "surgery" / "rank.onnx").unlink()
    there = Workspace(artifacts=tmp_path / "artifacts", reports=tmp_path / "reports", values={})
    config = HSTUConfig.from_pretrained(there.artifacts / "surgery")
    row = conformance.build_row(
        "trained", config, there.artifacts / "surgery", "retrieve", "fp32", "1", BuildSettings(profiles=("all",))
    )
    assert (row.result, row.engine_sha256) == ("rejected", None)
    assert "user/Unique" in str(row.reason)
    assert "trained retrieve fp32: " in conformance.table_text([row])


def test_resuming_keeps_the_rows_of_this_version(workspace: Workspace) -> None:
    path = workspace.reports / conformance.FILE
    rows = json.loads(path.read_bytes())
    rows[0]["reason"] = "kept"
    path.write_text(json.dumps(rows))
    found = conformance.run_conformance(workspace, ["trained"], ["int8", "int8+fp16"], resume=True)
    assert [row.reason for row in found].count("kept") == 1


def test_random_models_get_every_pass(tmp_path: Path) -> None:
    config = HSTUConfig(num_items=40, embedding_dim=8, num_layers=2, num_heads=1, qk_dim=4, v_dim=4, max_history=6)
    conformance.write_graphs(config, tmp_path / "surgery")
    for name in ("retrieve", "extend"):
        domains = {node.domain for node in onnx.load(tmp_path / "surgery" / f"{name}.onnx").graph.node}
        assert "hstu" in domains


def test_metas_shapes_are_those_of_its_public_configs() -> None:
    rows = {name: c.num_items + 1 for name, c in conformance.MODELS.items() if name.startswith(("ml", "amzn"))}
    assert rows == {
        "ml-1m": 3953, "ml-1m-large": 3953, "ml-20m": 131263, "ml-20m-large": 131263,
        "amzn-books": 695763, "amzn-books-large": 695763,
    }  # fmt: skip
    for name, config in conformance.MODELS.items():
        if name in rows:
            assert config.max_history + config.max_generated + 1 == (61 if "books" in name else 211)


def test_mistakes_are_told(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown 'ml-2m'"):
        conformance.run_conformance(workspace, ["ml-2m"], ["fp32"])
    (tmp_path / conformance.FILE).write_text('[{"model": 1}]')
    with pytest.raises(InputError, match="not a conformance report"):
        conformance.read_rows(tmp_path / conformance.FILE)
