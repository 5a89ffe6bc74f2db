"""Rebuild: the same engines from the ONNX files beside them, and one clear error for what cannot be rebuilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hstu.artifact import Artifact
from hstu.errors import ArtifactError, CompilerError, UsageError
from serving.engines.tensorrt_facts import read_facts
from stages.rebuild import rebuild, rebuilt_if_needed
from stages.tensorrt.builder import BuildSettings
from stages.tensorrt.engine import compile_entries
from stages.tensorrt.products import TENSORRT_RTX
from tests.models import TINY


@pytest.fixture(scope="module")
def folder(surgered: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of TensorRT-RTX engines, one wide profile each."""
    path = tmp_path_factory.mktemp("engine")
    for name in surgered.manifest["files"]:
        shutil.copyfile(surgered.file(name), path / name)
    settings = BuildSettings(profiles=("all",), optimization_level=0)
    entries = compile_entries(TENSORRT_RTX, path, TINY, settings, timing_caches=None)
    spec = {"backend": "tensorrt-rtx", "precision": "fp32", "entries": entries, "executed": False}
    (path / "engine.json").write_text(json.dumps(spec))
    return path


def test_a_rebuild_has_the_same_settings_and_files(folder: Path, tmp_path: Path) -> None:
    again = rebuild(folder, tmp_path / "below" / "again")
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in folder.iterdir())
    before, after = read_facts(folder), read_facts(again)
    assert after.settings == before.settings
    assert [entry.bytes for entry in after.entries.values()] == [entry.bytes for entry in before.entries.values()]
    with pytest.raises(UsageError, match="exists already"):
        rebuild(folder, again)


def test_what_cannot_be_rebuilt(folder: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(folder, gone)
    (gone / "rank.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"is gone") as caught:
        rebuild(gone, tmp_path / "new")
    assert "rank.onnx" in str(caught.value)
    spec = json.loads((gone / "engine.json").read_text())
    (gone / "engine.json").write_text(json.dumps(spec | {"backend": "onnxruntime"}))
    with pytest.raises(UsageError, match="not tied to a machine"):
        rebuild(gone, tmp_path / "new")
    assert rebuilt_if_needed(gone, tmp_path / "new") is None  # nothing of ONNX Runtime's needs it
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_a_rebuild_to_run_here_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CompilerError, match="cannot be rebuilt for running here"):
        rebuilt_if_needed(folder, tmp_path / "new")
    assert "GPU: built for any, here none" in capsys.readouterr().err
