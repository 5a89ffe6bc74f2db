"""The models of cases are compiled as the bundle was, once, and anew when the code changes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

from stages.measure.case_models import compiler_sources, random_files
from stages.measure.contestants import contestants
from stages.measure.session import Session
from tests.models import tiny_config
from tests.stages.measure.requests import CASE, EFFORT


@pytest.mark.slow
def test_a_random_model_is_compiled_as_the_bundle_was_and_only_once(tmp_path: Path) -> None:
    """With the lineage that real stages write: every stage runs on the parameters recorded there."""
    lineage = tmp_path / "bundle" / "lineage"
    lineage.mkdir(parents=True)
    from stages.parameters import read_params

    params = read_params(Path(__file__).parents[3] / "params.yaml")
    for name in ("prepare-data", "checkpoint", "export-onnx", "surgery"):
        (lineage / f"{name}.json").write_text(json.dumps({"params": params[name]}))
    (lineage / "build-engine-fp32.json").write_text(json.dumps({"params": params["build-engine"]}))
    engine = tmp_path / "bundle" / "engines" / "fp32"
    engine.mkdir(parents=True)
    spec = {"backend": "onnxruntime", "precision": "fp32", "entries": {}, "executed": True}
    (engine / "engine.json").write_text(json.dumps(spec))
    config = tiny_config(num_layers=1, num_actions=0, num_gap_buckets=0)
    case = dataclasses.replace(CASE, name="tiny", config=config, batches=(2,))
    files, refused = random_files(case, tmp_path / "bundle", tmp_path / "cases")
    assert refused == {}
    assert sorted(files.engines) == ["fp32"]
    done = Session(
        case=case, config=config, effort=EFFORT, seed=0, on_cell=lambda _found: None,
        contestants=[c for c in contestants(files) if c.runtime != "torch-compile"],
    )  # fmt: skip
    done.measure("all")
    ours = ("torch-eager", "onnx-plain", "engine")
    right = {(r["entry"], r["correct"]) for r in done.rows if r["precision"] == "fp32" and r["runtime"] in ours}
    assert right == {("retrieve", True), ("rank", True)}
    stamp = (files.onnx / "manifest.json").stat().st_mtime_ns
    shutil.rmtree(files.engines["fp32"])  # as if it had been interrupted there: the rest stands
    again, _ = random_files(case, tmp_path / "bundle", tmp_path / "cases")
    assert again == files
    assert (files.engines["fp32"] / "engine.json").is_file()
    assert (files.onnx / "manifest.json").stat().st_mtime_ns == stamp
    other = dataclasses.replace(case, config=dataclasses.replace(config, num_items=60))
    changed, _ = random_files(other, tmp_path / "bundle", tmp_path / "cases")
    assert changed.checkpoint != files.checkpoint
    assert not files.checkpoint.exists()


def test_a_case_is_compiled_anew_when_any_code_that_compiles_it_changes() -> None:
    """What dvc.yaml names as the code behind an engine is in the digest; what only measures is not."""
    root = Path(__file__).parents[3]
    sources = {path.relative_to(root).as_posix() for path in compiler_sources(root)}
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    for name in ("prepare-data", "checkpoint", "export-onnx", "surgery", "build-engine"):
        for given in stages[name]["deps"]:
            path = root / given
            files = [path] if path.is_file() else sorted(path.rglob("*.py"))
            for file in files if given.partition("/")[0] in ("stages", "hstu") else []:
                if file.read_bytes() and "tensorrt" not in file.as_posix():  # of a device that is not here
                    assert file.relative_to(root).as_posix() in sources
    assert "kernels/cpu/avx512.cpp" in sources
    measuring = {path for path in sources if path.startswith(("stages/measure", "stages/report", "stages/gate"))}
    assert measuring <= {"stages/measure/statistics.py"}  # which build-engine uses
