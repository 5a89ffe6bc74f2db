"""Verify: bytes, lineage and golden answers of a whole small bundle, and of ones harmed on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.artifact import MANIFEST, encode_json, open_artifact, sha256_file
from hstu.errors import ArtifactError, GateError, UsageError
from hstu.tolerances import TOLERANCES
from stages.shipping.ship import ship
from stages.verify import _limits, compare, render, replay, verify
from tests.stages.bundles import checksummed, rewrite, write_artifacts
from tests.stages.shipping.shipments import write_keys


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no test changes."""
    return write_artifacts(tmp_path_factory.mktemp("whole") / "artifacts")


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy to harm, far from the artifacts it was made from."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def test_a_whole_bundle(whole: Path) -> None:
    result = verify(whole)
    assert json.loads(json.dumps(result)) == result
    assert result["lineage"] == [
        "build-engine/fp32", "build-engine/fp32-tensorrt-rtx", "checkpoint", "export-onnx", "prepare-data",
    ]  # fmt: skip
    assert "golden" not in result
    assert "every byte is as it was written" in render(result)


def test_golden_answers_are_replayed_by_every_engine_that_runs_here(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = verify(whole, run=True)
    assert set(result["golden"]) == {"torch", "fp32", "fp32-tensorrt-rtx"}
    for engine in ("torch", "fp32"):
        assert set(result["golden"][engine]["entries"]) == {"retrieve", "extend"}
        for entry in ("retrieve", "extend"):
            assert result["golden"][engine]["entries"][entry]["top10_overlap"] == 1.0
            assert result["golden"][engine]["entries"][entry]["max_abs_error"] < 1e-6
    assert "does not execute on this machine" in result["golden"]["fp32-tensorrt-rtx"]["skipped"]
    assert "not replayed" in capsys.readouterr().err
    text = render(result)
    assert "fp32 retrieve: golden answers reproduced" in text
    assert "fp32-tensorrt-rtx: not replayed" in text


def test_other_artifacts_are_verified_too(whole: Path) -> None:
    result = verify(whole.parent / "export-onnx")
    assert (result["stage"], set(result["inputs"])) == ("export-onnx", {"checkpoint"})
    with pytest.raises(UsageError, match="only a bundle carries golden answers"):
        verify(whole.parent / "export-onnx", run=True)
    with pytest.raises(ArtifactError, match="there is no artifact here"):
        verify(whole.parent / "nowhere")


def test_a_changed_byte_is_found(bundle: Path) -> None:
    path = bundle / "engines" / "fp32" / "retrieve.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"retrieve\.onnx"):
        verify(bundle)


def other_weights(bundle: Path) -> None:
    (bundle / "model.safetensors").write_bytes(b"other")


def other_engine(bundle: Path) -> None:
    (bundle / "engines" / "fp32" / "retrieve.onnx").write_bytes(b"other")


def no_engine(bundle: Path) -> None:
    (bundle / "engines" / "fp32" / "weights.bin").unlink()


def no_copy(bundle: Path) -> None:
    (bundle / "lineage" / "checkpoint.json").unlink()


def extra_copy(bundle: Path) -> None:
    shutil.copyfile(bundle / "lineage" / "checkpoint.json", bundle / "lineage" / "surgery.json")


def broken_copy(bundle: Path) -> None:
    (bundle / "lineage" / "checkpoint.json").write_text("{}")


def other_copy(bundle: Path) -> None:
    path = bundle / "lineage" / "checkpoint.json"
    path.write_bytes(checksummed({**json.loads(path.read_bytes()), "params": {"source": "meta"}}))


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (other_weights, r"model\.safetensors is not the file of checkpoint"),
        (other_engine, r"engines/fp32/retrieve\.onnx is not the file of build-engine/fp32"),
        (no_engine, r"engines/fp32/weights\.bin is not the file of build-engine/fp32"),
        (no_copy, "does not hold the manifests of the inputs"),
        (extra_copy, "does not hold the manifests of the inputs"),
        (broken_copy, "not a manifest of ours"),
        (other_copy, "lineage of checkpoint"),
    ],
)
def test_a_bundle_put_together_by_hand_is_found(bundle: Path, harm: Callable[[Path], None], what: str) -> None:
    """The manifest is made true again after the change: every hash is right, the lineage is not."""
    harm(bundle)
    rewrite(bundle)
    with pytest.raises(ArtifactError, match=what):
        verify(bundle)


def test_inputs_of_two_pipelines_are_found(bundle: Path) -> None:
    """An export of another checkpoint, with its own true manifest, beside this checkpoint."""
    path = bundle / "lineage" / "export-onnx.json"
    manifest = json.loads(path.read_bytes())
    manifest["inputs"]["checkpoint"] = "0" * 64
    path.write_bytes(checksummed(manifest))
    inputs = json.loads((bundle / MANIFEST).read_bytes())["inputs"]
    rewrite(bundle, inputs=inputs | {"export-onnx": sha256_file(path)})
    with pytest.raises(ArtifactError, match=r"made from another (checkpoint|export-onnx)"):
        verify(bundle)


def change_golden(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "golden" / "outputs.npz"
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)
    rewrite(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays["retrieve/user_embedding"].__iadd__(1e-3),
        lambda arrays: arrays["retrieve/top_scores"].fill(np.nan),
        lambda arrays: arrays.update({"retrieve/top_item_ids": arrays["retrieve/top_item_ids"][:, ::-1]}),
        lambda arrays: arrays.update({"retrieve/top_scores": arrays["retrieve/top_scores"][:, :5]}),
        lambda arrays: arrays.pop("retrieve/top_scores"),
    ],
)
def test_other_answers_are_refused(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    change_golden(bundle, change)
    with pytest.raises(GateError) as caught:
        verify(bundle, run=True)
    assert caught.value.exit_code == 5


def test_an_engine_that_answers_otherwise_is_named(bundle: Path) -> None:
    """The weights of the engine alone are changed: torch still reproduces the golden answers, the engine does not."""
    for folder in (bundle / "engines" / "fp32", bundle / "onnx"):
        weights = np.fromfile(folder / "weights.bin", dtype=np.float32)
        (folder / "weights.bin").write_bytes((weights * np.float32(1.5)).tobytes())
    rewrite(bundle)
    with pytest.raises(ArtifactError, match=r"weights\.bin is not the file of"):
        verify(bundle, run=True)
    with pytest.raises(GateError, match="fp32: the retrieve entry does not give the golden answers"):
        replay(open_artifact(bundle))


def test_golden_files_that_are_none_are_refused(bundle: Path) -> None:
    (bundle / "golden" / "inputs.npz").write_bytes(b"PK\x03\x04 cut short")
    rewrite(bundle)
    with pytest.raises(ArtifactError, match="not golden arrays"):
        verify(bundle, run=True)


def test_an_unknown_precision_is_refused(bundle: Path) -> None:
    path = bundle / "engines" / "fp32" / "engine.json"
    path.write_bytes(encode_json({**json.loads(path.read_bytes()), "precision": "fp2"}))
    rewrite(bundle)
    with pytest.raises(ArtifactError, match="no such precision"):
        replay(open_artifact(bundle))


def test_ties_may_be_ordered_either_way() -> None:
    ids = np.arange(1, 13, dtype=np.int64)[None]
    scores = np.linspace(1.0, 0.5, 12, dtype=np.float32)[None]
    scores[0, 10] = scores[0, 9] - np.float32(1e-7)  # the tenth and eleventh are as good as equal
    golden = {"top_item_ids": ids, "top_scores": scores}
    swapped = ids.copy()
    swapped[0, [9, 10]] = swapped[0, [10, 9]]
    assert compare({"top_item_ids": swapped, "top_scores": scores}, golden, 1e-5)["top10_overlap"] == 1.0
    swapped[0, [0, 11]] = swapped[0, [11, 0]]
    assert compare({"top_item_ids": swapped, "top_scores": scores}, golden, 1e-5)["top10_overlap"] == 0.9


def test_task_scores_are_compared_too() -> None:
    golden = {"task_scores": np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 4, 3)}
    assert compare(golden, golden, 1e-5) == {"max_abs_error": 0.0}
    other = golden["task_scores"].copy()
    other[1, 2, 0] += np.float32(0.25)
    assert compare({"task_scores": other}, golden, 1e-5)["max_abs_error"] == pytest.approx(0.25)
    other[0, 0, 0] = np.nan
    assert np.isnan(compare({"task_scores": other}, golden, 1e-5)["max_abs_error"])
    with pytest.raises(GateError, match="not those of the golden answers"):
        compare({"task_scores": other[:1]}, golden, 1e-5)


def test_an_engine_is_held_to_the_limits_it_was_built_with(whole: Path) -> None:
    artifact = open_artifact(whole)
    assert _limits(artifact, "fp32", "fp32") == replace(TOLERANCES["fp32"], max_abs_error=2e-5)
    assert _limits(artifact, "torch", "fp32") == TOLERANCES["fp32"]


def test_what_fits_this_machine_is_told(whole: Path) -> None:
    result = verify(whole)
    assert {name: found["status"] for name, found in result["environment"].items()} == {
        "fp32": "fits", "fp32-tensorrt-rtx": "conformance",
    }  # fmt: skip
    assert "fp32: fits, ONNX Runtime" in render(result)


def test_a_shipped_bundle_is_unpacked_and_checked_like_any_other(whole: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    ship(whole, tmp_path / "shipped", key=private)
    result = verify(tmp_path / "shipped", key=public, run=True)
    assert result["path"] == str(tmp_path / "shipped")
    assert set(result["golden"]) == {"torch", "fp32", "fp32-tensorrt-rtx"}
    assert "signed with the key" in render(result)
    with pytest.raises(UsageError, match="only a bundle carries"):
        verify(whole.parent / "export-onnx", key=public)
