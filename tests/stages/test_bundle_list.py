"""Listing bundles, and what differs between two of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hstu.artifact import encode_json, open_artifact, write_manifest
from hstu.errors import ArtifactError
from stages.bundle_diff import diff_bundles
from stages.bundle_diff import render as render_diff
from stages.bundle_list import list_bundles, render
from stages.versions import version_key

WEIGHTS = {"layer": np.arange(6, dtype=np.float32).reshape(2, 3), "head": np.ones(4, dtype=np.float32)}


def write(
    folder: Path, version: str, *, hr: float = 0.5, weights: dict[str, np.ndarray] = WEIGHTS, seed: int = 0,
    torch: str = "2.0", overlap: float = 0.99, engines: tuple[str, ...] = ("fp32", "int8"),
) -> Path:  # fmt: skip
    """A bundle with weights, metrics, engines with their gate's figures and one ancestor."""
    (folder / "lineage").mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    engine = {"backend": "onnxruntime", "product": "ONNX Runtime", "version": "1.0", "device": "cpu", "executed": True}
    description = {
        "version": version,
        "default_engine": "fp32",
        "engines": dict.fromkeys(engines, engine),
        "checkpoint": {"metrics": {"hr_at_10": hr, "num_parameters": 10}},
    }
    (folder / "bundle.json").write_bytes(encode_json(description))
    for name in engines:
        (folder / "engines" / name).mkdir(parents=True)
        (folder / "engines" / name / "quality.json").write_bytes(encode_json({"top10_overlap": overlap}))
    parent = folder.parent / f".{folder.name}-checkpoint"
    parent.mkdir()
    made = write_manifest(parent, stage="checkpoint", params={"seed": seed}, inputs={}, toolchain={"torch": torch})
    shutil.move(parent / "manifest.json", folder / "lineage" / "checkpoint.json")
    write_manifest(
        folder, stage="bundle", params={"version": version}, inputs={"checkpoint": made.id}, toolchain={"torch": torch}
    )
    return folder


def test_bundles_are_listed_by_version_with_their_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "b", "0.10.0", hr=0.75)
    write(tmp_path / "a", "0.9.1", hr=0.5)
    (tmp_path / "neither").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    rows = list_bundles(tmp_path)
    assert json.loads(json.dumps(rows)) == rows
    assert [(row["version"], row["metrics"]["hr_at_10"]) for row in rows] == [("0.9.1", 0.5), ("0.10.0", 0.75)]
    assert rows[0]["engines"]["int8"]["quality"] == {"top10_overlap": 0.99}
    text = render(rows)
    assert "hr_at_10 0.7500" in text
    assert "fp32 (default): ONNX Runtime 1.0  top10_overlap 0.9900" in text
    assert "left out" in capsys.readouterr().err
    assert [row["id"] for row in list_bundles(tmp_path / "a")] == [open_artifact(tmp_path / "a").id]
    for nothing in (tmp_path / "neither", tmp_path / "nowhere"):
        with pytest.raises(ArtifactError):
            list_bundles(nothing)


def test_what_differs(tmp_path: Path) -> None:
    other = {"layer": WEIGHTS["layer"] + np.float32([[0, 0, 0.5], [0, 0, 0]]), "more": np.zeros(2, dtype=np.float32)}
    a = write(tmp_path / "a", "0.1.0")
    b = write(tmp_path / "b", "0.2.0", hr=0.6, weights=other, seed=1, torch="2.1", overlap=0.98, engines=("fp32",))
    found = diff_bundles(a, b)
    assert json.loads(json.dumps(found)) == found
    assert found["params"] == {"bundle.version": ["0.1.0", "0.2.0"], "checkpoint.seed": [0, 1]}
    assert found["toolchain"] == {"bundle.torch": ["2.0", "2.1"], "checkpoint.torch": ["2.0", "2.1"]}
    assert found["metrics"] == {
        "fp32.top10_overlap": [0.99, 0.98], "hr_at_10": [0.5, 0.6], "int8.top10_overlap": [0.99, None],
    }  # fmt: skip
    assert found["engines"] == {"int8": ["ONNX Runtime 1.0", None]}
    assert found["weights"]["changed"] == {
        "head": "removed", "layer": "largest difference 0.5, 16.7% of its values", "more": "added",
    }  # fmt: skip
    assert found["files"]["removed"] == ["engines/int8/quality.json"]
    text = render_diff(found)
    assert "checkpoint.seed: 0 → 1" in text
    assert "int8.top10_overlap: 0.99 → –" in text
    assert "weights: 3 of 3 tensors changed" in text
    assert render_diff(diff_bundles(a, a)).startswith("the same bundle: 0.1.0")


def test_other_shapes_and_nothing_else(tmp_path: Path) -> None:
    a = write(tmp_path / "a", "0.1.0")
    b = write(tmp_path / "b", "0.1.0", weights={**WEIGHTS, "head": np.ones(5, dtype=np.float32)})
    found = diff_bundles(a, b)
    assert found["weights"]["changed"] == {"head": "shape [4] → [5]"}
    assert found["params"] == found["metrics"] == found["toolchain"] == {}
    assert "params: the same" in render_diff(found)
    (b / "bundle.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"bundle\.json"):
        diff_bundles(a, b)


@pytest.mark.parametrize(
    "text", ["", "1", "1.0", "1.0.0.0", "01.0.0", "1.0.-1", "1.0.0-rc1", "١.0.0", "1.0.0\n", 1, None]
)
def test_what_is_no_version(text: object) -> None:
    assert version_key(text) is None


def test_versions_are_ordered_by_number() -> None:
    assert version_key("0.10.0") > version_key("0.9.9") > version_key("0.0.12")  # type: ignore[operator]
