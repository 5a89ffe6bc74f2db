"""Lineage: the tree is found by ids alone, and what is not to be found is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hstu.artifact import MANIFEST, Artifact, write_manifest
from hstu.errors import ArtifactError
from stages.lineage import Node, lineage


def write(artifacts: Path, name: str, *inputs: Artifact, version: int = 1, executed: bool = True) -> Artifact:
    folder = artifacts / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text(f"{name} {version}")
    return write_manifest(
        folder,
        stage=name.partition("/")[0],
        params={"version": version, "source": None},
        inputs={artifact.path.relative_to(artifacts).as_posix(): artifact.id for artifact in inputs},
        toolchain={"onnx": "1"},
        platform={"executed": executed},
    )


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    artifacts = tmp_path / "artifacts"
    data = write(artifacts, "prepare-data")
    checkpoint = write(artifacts, "checkpoint", data)
    export = write(artifacts, "export-onnx", checkpoint)
    engine = write(artifacts, "build-engine/int8", checkpoint, export, executed=False)
    bundle = write(artifacts, "bundle", data, checkpoint, export, engine)
    lineage_folder = bundle.path / "lineage"
    lineage_folder.mkdir()
    for artifact in (data, checkpoint, export, engine):
        name = artifact.path.relative_to(artifacts).as_posix().replace("/", "-")
        shutil.copyfile(artifact.path / MANIFEST, lineage_folder / f"{name}.json")
    write_manifest(
        bundle.path,
        stage="bundle",
        params={"version": 1},
        inputs=dict(bundle.manifest["inputs"]),
        toolchain={},
    )
    return artifacts


def names(node: Node) -> list[str]:
    return [node.name, *(name for parent in node.inputs for name in names(parent))]


def test_the_tree_up_to_the_sources(artifacts: Path) -> None:
    tree = lineage(artifacts / "build-engine" / "int8", artifacts)
    assert names(tree) == ["build-engine", "checkpoint", "prepare-data", "export-onnx", "checkpoint", "prepare-data"]
    assert tree.missing == []
    lines = tree.text.splitlines()
    assert lines[0].startswith("build-engine  ")
    assert lines[0].endswith("version=1  built, not executed")
    assert lines[1].startswith("  checkpoint  ")
    assert lines[2].startswith("    prepare-data  ")
    assert lines[-1].endswith("(see above)")
    described = tree.to_dict()
    assert json.loads(json.dumps(described)) == described
    assert described["inputs"][0]["toolchain"] == {"onnx": "1"}
    assert described["inputs"][0]["where"] == str(artifacts / "checkpoint")


def test_a_bundle_carries_its_lineage(artifacts: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(artifacts / "bundle", tmp_path / "elsewhere"))
    shutil.rmtree(artifacts)
    tree = lineage(moved, artifacts)
    assert tree.missing == []
    assert {"prepare-data", "checkpoint", "export-onnx", "build-engine/int8", "bundle"} == set(names(tree))
    assert {node.where for node in tree.inputs} >= {"lineage/checkpoint.json", "lineage/build-engine-int8.json"}


def test_a_removed_parent_is_said(artifacts: Path) -> None:
    shutil.rmtree(artifacts / "checkpoint")
    tree = lineage(artifacts / "export-onnx", artifacts)
    assert tree.missing == ["checkpoint"]
    assert "not to be found" in tree.text
    assert tree.to_dict()["inputs"][0]["inputs"] == []


def test_a_replaced_parent_is_not_taken_for_the_one_that_was(artifacts: Path) -> None:
    replaced = write(artifacts, "checkpoint", write(artifacts, "prepare-data", version=2), version=2)
    tree = lineage(artifacts / "export-onnx", artifacts)
    assert tree.missing == ["checkpoint"]
    assert f"replaced since: checkpoint is now {replaced.id[:12]}" in tree.text


def test_what_killed_runs_left_is_not_looked_at(artifacts: Path) -> None:
    (artifacts / "checkpoint").rename(artifacts / ".checkpoint.tmp-abc")
    assert lineage(artifacts / "export-onnx", artifacts).missing == ["checkpoint"]


def test_a_harmed_parent_is_missing_and_a_harmed_bundle_is_refused(artifacts: Path) -> None:
    (artifacts / "checkpoint" / MANIFEST).write_text("{}")
    assert lineage(artifacts / "export-onnx", artifacts).missing == ["checkpoint"]
    assert lineage(artifacts / "bundle", artifacts).missing == []
    (artifacts / "bundle" / "lineage" / "checkpoint.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a manifest of ours"):
        lineage(artifacts / "bundle", artifacts)


def test_what_is_no_artifact_has_no_lineage(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact here"):
        lineage(tmp_path / "nowhere", tmp_path)
