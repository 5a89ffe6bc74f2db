"""The builder: versions, options, refusals in NVIDIA's words, a log in a few figures, memory that runs out."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import onnx
import pytest

from hstu.artifact import Artifact
from hstu.errors import ArtifactError, CompilerError, MissingBackendError
from serving.engines.tensorrt_facts import Device, read_facts
from stages.onnx_files import read_models
from stages.tensorrt import timing_cache, worker
from stages.tensorrt.builder import BuildSettings, Built, build
from stages.tensorrt.engine import compile_entries
from stages.tensorrt.log import kinds, memory
from stages.tensorrt.products import TENSORRT, TENSORRT_RTX, RejectedError, has_module, require_product
from tests.models import TINY

ROOT = Path(__file__).parents[3]
QUICK = BuildSettings(profiles=("all",), optimization_level=0)
SWISS = ("a", "b")


def built(surgered: Artifact, engine: Path, settings: BuildSettings = QUICK) -> Built:
    return build(TENSORRT_RTX, surgered.file("retrieve.onnx"), engine, TINY, "retrieve", settings)


def test_networks_are_strongly_typed_by_version() -> None:
    worker.use_product("tensorrt_rtx")
    flag = 1 << int(import_module("tensorrt_rtx").NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert worker.network_flags("tensorrt_rtx", "1.7.1.116") == flag
    assert worker.network_flags("tensorrt", "10.16.0.72") == flag
    assert worker.network_flags("tensorrt", "11.4.0.1") == 0


def test_a_folder_of_engines_says_what_built_it(surgered: Artifact, tmp_path: Path) -> None:
    for name in surgered.manifest["files"]:
        (tmp_path / name).write_bytes(surgered.file(name).read_bytes())
    files = compile_entries(TENSORRT_RTX, tmp_path, TINY, BuildSettings(optimization_level=0), timing_caches=None)
    facts = read_facts(tmp_path)
    assert files == {name: f"{name}.rtx" for name in ("retrieve", "rank", "extend")}
    assert (facts.product, facts.version, facts.executed) == ("TensorRT-RTX", require_product(TENSORRT_RTX), False)
    assert facts.device is None
    for entry in facts.entries.values():
        assert [profile["name"] for profile in entry.profiles] == ["single", "batch", "long"]
        assert entry.memory["weights_bytes"] > 0
        assert entry.layers["NORMALIZATION FLOAT"] >= 2 * TINY.num_layers
        assert all("FLOAT" in kind or "HALF" not in kind for kind in entry.layers)


def test_memory_that_a_profile_needs_is_told_from_memory_that_lacks() -> None:
    """Without 64 GiB of workspace the reference's largest profile is refused: more is needed, not less."""
    reason = "Error Code 2: OutOfMemory (Requested size was 9055570272 bytes.)"
    assert "raise build-engine.workspace_mib" in str(RejectedError(TENSORRT_RTX, Path("retrieve.onnx"), [reason]))
    reason = "Error Code 2: OutOfMemory (CUDA error 2)"
    assert "lower build-engine.optimization_level" in str(RejectedError(TENSORRT, Path("retrieve.onnx"), [reason]))


def test_several_profiles_make_one_engine(surgered: Artifact, tmp_path: Path) -> None:
    sizes = []
    for profiles in (("all",), ("batch", "long")):
        built(surgered, tmp_path / "engine.rtx", BuildSettings(profiles=profiles, optimization_level=0))  # type: ignore[arg-type]
        sizes.append((tmp_path / "engine.rtx").stat().st_size)
    assert sizes[1] > 1.2 * sizes[0]  # code for each profile, the weights once


@pytest.mark.skipif(import_module("torch").cuda.is_available(), reason="a GPU is here, and some of these build")
@pytest.mark.parametrize(
    ("settings", "reason", "fix"),
    [
        (BuildSettings(profiles=("all",), hardware_compatibility="ampere_plus"), "is unsupported", "does not have it"),
        (BuildSettings(profiles=("all",), version_compatible=True), "libnvinfer_lean", "version_compatible: false"),
        (BuildSettings(profiles=("all",), refit=True), "CUDA_SUCCESS", "need one"),
        (BuildSettings(profiles=("all",), strip_plan=True), "CUDA_SUCCESS", "need one"),
    ],
    ids=["hardware", "version", "refit", "strip"],
)
def test_options_that_tensorrt_rtx_refuses_here(
    surgered: Artifact, tmp_path: Path, settings: BuildSettings, reason: str, fix: str
) -> None:
    with pytest.raises(RejectedError, match=reason) as caught:
        built(surgered, tmp_path / "engine.rtx", settings)
    assert fix in str(caught.value)
    assert not (tmp_path / "engine.rtx").exists()


def test_weights_may_be_streamed(surgered: Artifact, tmp_path: Path) -> None:
    built(surgered, tmp_path / "engine.rtx", BuildSettings(profiles=("all",), weight_streaming=True))
    assert (tmp_path / "engine.rtx").stat().st_size > 0


def test_memory_that_runs_out_is_said_with_what_to_lower(
    surgered: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nulimit -d 100000\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(limited))
    with pytest.raises(CompilerError, match=r"retrieve\.onnx") as caught:
        built(surgered, tmp_path / "x")
    assert "lower build-engine.optimization_level or workspace_mib" in str(caught.value)


def test_unsigned_and_mixed_types_are_refused_by_nvidias_own_parser(surgered: Artifact, tmp_path: Path) -> None:
    def reasons(*nodes: onnx.NodeProto, constants: tuple[onnx.TensorProto, ...]) -> str:
        model = read_models(surgered.path, ["retrieve"])["retrieve"]
        position = list(model.graph.node).index(next(n for n in model.graph.node if n.op_type == "Gemm"))
        head = model.graph.node[position]
        nodes[0].input[0] = head.input[0]
        head.input[0] = nodes[-1].output[0]
        for node in reversed(nodes):
            model.graph.node.insert(position, node)
        model.graph.initializer.extend(constants)
        onnx.save(model, tmp_path / "retrieve.onnx")
        with pytest.raises(RejectedError) as caught:
            build(TENSORRT_RTX, tmp_path / "retrieve.onnx", tmp_path / "x.rtx", TINY, "retrieve", QUICK)
        return " ".join(caught.value.reasons)

    tensor = onnx.helper.make_tensor
    half = tensor("half", onnx.TensorProto.FLOAT16, [], [1.0])
    mixed = reasons(onnx.helper.make_node("Mul", ["", "half"], ["mixed"], name="planted/Mul"), constants=(half,))
    assert "planted/Mul" in mixed
    scale = tensor("scale", onnx.TensorProto.FLOAT, [], [0.1])
    zero = tensor("zero", onnx.TensorProto.UINT8, [], [128])
    quantize = onnx.helper.make_node("QuantizeLinear", ["", "scale", "zero"], ["q"], name="planted/Q")
    dequantize = onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], name="planted/DQ")
    unsigned = reasons(quantize, dequantize, constants=(scale, zero))
    assert "planted/" in unsigned


def test_polygraphy_finds_every_entry_fully_supported(surgered: Artifact) -> None:
    polygraphy = Path(sys.executable).parent / "polygraphy"
    for name in ("retrieve", "rank", "extend"):
        done = subprocess.run(
            [polygraphy, "inspect", "capability", str(surgered.file(f"{name}.onnx"))],
            capture_output=True, text=True, check=False, env={"POLYGRAPHY_USE_TENSORRT_RTX": "1", "PATH": "/usr/bin"},
        )  # fmt: skip
        assert "Graph is fully supported" in done.stdout, done.stdout + done.stderr


def test_the_log_is_summarised() -> None:
    lines = ["Total Weights Memory: 100 bytes", "Total Activation Memory: 7 bytes", "Total Activation Memory: 9 bytes"]
    assert memory(lines) == {"weights_bytes": 100, "activation_bytes": 9}
    twice = [f"A node named f.{n} already exists, the output tensors of it" for n in SWISS]
    assert kinds([*twice, "else"]) == {"A node named … already exists, the output … of it": 2, "else": 1}


H200 = Device(name="NVIDIA H200", sm="9.0", cuda="13.0", driver_cuda="13.0")


def test_a_timing_cache_belongs_to_one_gpu_and_version(tmp_path: Path) -> None:
    name = timing_cache.cache_name("TensorRT", "11.4.0", H200)
    assert name == "nvidia-h200-sm9.0-tensorrt-11.4.0.cache"
    assert not timing_cache.take(tmp_path / "caches", name, tmp_path / "taken")
    (tmp_path / "made").write_bytes(b"tactics" * 50)
    timing_cache.keep(tmp_path / "made", tmp_path / "caches", name)
    assert timing_cache.take(tmp_path / "caches", name, tmp_path / "taken")
    assert (tmp_path / "taken").read_bytes() == b"tactics" * 50
    assert not timing_cache.take(
        tmp_path / "caches", timing_cache.cache_name("TensorRT", "11.5.0", H200), tmp_path / "x"
    )


def test_a_truncated_timing_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"tactics" * 50)
    timing_cache.keep(tmp_path / "made", tmp_path, "a.cache")
    (tmp_path / "a.cache").write_bytes(b"tactics" * 49)
    with pytest.raises(ArtifactError, match="the timing cache is damaged") as caught:
        timing_cache.take(tmp_path, "a.cache", tmp_path / "taken")
    assert "delete it" in str(caught.value)
    (tmp_path / "a.cache.json").write_text(json.dumps({}))
    with pytest.raises(ArtifactError, match="damaged"):
        timing_cache.take(tmp_path, "a.cache", tmp_path / "taken")


@pytest.mark.skipif(has_module(TENSORRT), reason="TensorRT is installed here")
def test_a_product_that_is_not_here() -> None:
    with pytest.raises(MissingBackendError, match="TensorRT is not installed"):
        require_product(TENSORRT)
