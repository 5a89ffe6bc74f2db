"""Whether a machine can run a bundle, engine by engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hstu.artifact import Artifact, encode_json, write_manifest
from hstu.errors import ArtifactError, MissingBackendError
from stages import environment_fit as fitting
from stages.environment_fit import environment_fit, require_fit
from stages.machine import Gpu, Gpus

HERE = {"onnxruntime": "1.2", "openvino": "2026.1", "tensorrt": "11.0"}
H200 = Gpu(name="NVIDIA H200", sm="9.0", memory_mib=1)


def bundle(folder: Path, engines: dict[str, dict[str, Any]], default: str = "fp32") -> Artifact:
    folder.mkdir()
    (folder / "bundle.json").write_bytes(encode_json({"default_engine": default, "engines": engines}))
    return write_manifest(folder, stage="bundle", params={}, inputs={}, toolchain={})


def engine(backend: str, version: str, *, device: str = "cpu", executed: bool = True) -> dict[str, Any]:
    return {"backend": backend, "product": backend, "version": version, "device": device, "executed": executed}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting.machine, "installed", HERE.get)
    monkeypatch.setattr(fitting.machine, "gpus", lambda: Gpus(devices=(H200,)))


@pytest.mark.parametrize(
    ("platform", "status"),
    [
        (engine("onnxruntime", "1.2"), "fits"),
        (engine("onnxruntime", "1.1"), "other version"),
        (engine("vllm", "1.0"), "missing"),
        (engine("tensorrt-rtx", "1.0", executed=False), "conformance"),
        (engine("tensorrt", "11.0", device="NVIDIA H200 sm_90 CUDA 13.0"), "fits"),
        (engine("tensorrt", "11.1", device="NVIDIA H200 sm_90 CUDA 13.0"), "missing"),
        (engine("tensorrt", "11.0", device="NVIDIA L4 sm_89 CUDA 13.0"), "missing"),
    ],
)
def test_an_engine(platform: dict[str, Any], status: str, tmp_path: Path) -> None:
    found = environment_fit(made := bundle(tmp_path / "bundle", {"fp32": platform}))
    assert found["fp32"]["status"] == status
    if status in fitting.RUNS:
        require_fit(made, found)
    else:
        with pytest.raises(MissingBackendError, match="default engine 'fp32' cannot run here") as refusal:
            require_fit(made, found)
        assert refusal.value.exit_code == 3


def test_the_default_engine_alone_is_needed(tmp_path: Path) -> None:
    engines = {"int8": engine("tensorrt", "9.0"), "fp32": engine("openvino", "2026.1")}
    found = environment_fit(made := bundle(tmp_path / "bundle", engines))
    assert list(found) == ["fp32", "int8"]
    require_fit(made, found)
    other = bundle(tmp_path / "other", engines, default="int8")
    with pytest.raises(MissingBackendError, match="engines that run here: fp32"):
        require_fit(other, environment_fit(other))


@pytest.mark.parametrize("engines", [{}, {"fp32": {}}, {"fp32": None}])
def test_a_bundle_that_does_not_name_its_engines(engines: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not name its engines"):
        environment_fit(bundle(tmp_path / "bundle", engines))
