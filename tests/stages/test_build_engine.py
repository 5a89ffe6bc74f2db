"""build-engine: every precision on every backend that is here, gated, reproducible, and refused with figures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hstu.artifact import Artifact, write_manifest
from hstu.errors import GateError, MissingBackendError, ParameterError
from hstu.signature import entry_names
from kernels.cpu.library import LIBRARY
from serving.engine import open_engine, read_spec
from serving.engines.torch import open_torch_engine
from stages import build_engine
from stages.build_engine import BuildEngineParams
from stages.contract import Outcome
from stages.engine_targets import choose
from stages.entry_check import check_batches, worst_error
from stages.onnx_files import read_models
from stages.tensorrt.builder import BuildSettings, build
from stages.tensorrt.products import TENSORRT, TENSORRT_RTX, RejectedError, has_module
from tests.models import TINY
from tests.stages.conftest import operate

PARAMS = BuildEngineParams(
    precision="fp32",
    backend="onnxruntime",
    rows="auto",
    float_keep_wide=("hidden", "logits"),
    int8_keep_wide=("output", "hidden", "logits"),
    int8_around="auto",
    int8_widen_at_most=0,
    int8_force=True,  # the tiny model is 16 wide: its int8 is slower
    calibration_histories=32,
    calibration_method="percentile",
    calibration_percentile=99.99,
    evaluation_histories=32,
    max_abs_error=None,
    min_cosine=None,
    min_mean_cosine=None,
    min_top10_overlap=None,
    max_quality_loss=None,
    tf32=False,
    optimization_level=3,
    workspace_mib=1024,
    profiles=("single", "batch", "long"),
    timing_caches=None,
    refit=False,
    strip_plan=False,
    weight_streaming=False,
    version_compatible=False,
    hardware_compatibility="none",
    tensorrt_attention="function",
)
# The tiny model is random and 16 wide: rounding shows more in it than in any trained one.
LIMITS: dict[str, dict[str, float]] = {
    "fp32": {},
    "fp16": {"max_abs_error": 0.02, "min_top10_overlap": 0.95, "max_quality_loss": 1.0},
    "bf16": {"max_abs_error": 0.2, "min_cosine": 0.995, "min_top10_overlap": 0.85, "max_quality_loss": 1.0},
    "int8": {"max_abs_error": 0.4, "min_cosine": 0.98, "min_top10_overlap": 0.8, "max_quality_loss": 1.0},
}


def params(precision: str, **changes: Any) -> BuildEngineParams:
    return replace(PARAMS, precision=precision, **{**LIMITS[precision], **changes})


def may_order_threads() -> bool:
    """Whether this machine lets a process choose the order of its threads (CAP_SYS_NICE)."""
    code = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def make(folder: Path, chosen: BuildEngineParams, inputs: dict[str, Artifact]) -> tuple[Artifact, Outcome]:
    folder.mkdir(parents=True)
    outcome = build_engine.run(chosen, inputs, folder)
    written = write_manifest(
        folder, stage="build-engine", params=asdict(chosen), inputs={}, toolchain={}, platform=outcome.platform
    )
    return written, outcome


@pytest.fixture(scope="module")
def inputs(surgered: Artifact, checkpoint: Artifact) -> dict[str, Artifact]:
    return {"surgery": surgered, "checkpoint": checkpoint}


@pytest.fixture(scope="module", params=list(LIMITS))
def engine(
    request: pytest.FixtureRequest, inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, Outcome]:
    return make(tmp_path_factory.mktemp("engine") / request.param, params(request.param), inputs)


def test_an_engine_says_what_it_is_and_answers(engine: tuple[Artifact, Outcome], checkpoint: Artifact) -> None:
    artifact, outcome = engine
    spec = read_spec(artifact.path)
    assert outcome.platform is not None
    assert (outcome.platform["backend"], outcome.platform["executed"]) == ("onnxruntime", True)
    assert set(artifact.manifest["files"]) == {
        "engine.json", "config.json", "recipe.json", "quality.json", "weights.bin",
        *(f"{name}.onnx" for name in entry_names(TINY)),
    }  # fmt: skip
    assert outcome.metrics["histories"] == 32
    running = open_engine(artifact.path, threads=1)
    assert (running.precision, running.config) == (spec.precision, TINY)
    reference = open_torch_engine(checkpoint.path)
    for name in entry_names(TINY):
        for feeds in check_batches(TINY, name, seed=3):
            error = worst_error(reference.run(name, feeds), running.run(name, feeds))
            assert error <= {"fp32": 1e-5, "fp16": 0.02, "bf16": 0.2, "int8": 0.4}[spec.precision]
    running.close()


def test_recipes_tell_what_computes_in_which_type(engine: tuple[Artifact, Outcome]) -> None:
    artifact, _ = engine
    recipe = json.loads(artifact.file("recipe.json").read_text())
    precision = recipe["recipe"]["precision"]
    narrow = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}[precision]
    linears = recipe["entries"]["rank"]["linears"]
    assert linears["layers.0.uvqk"] == linears["layers.1.uvqk#1"] == narrow
    assert linears["layers.0.output"] == ("float32" if precision == "int8" else narrow)
    assert linears["task_heads.logits"] == "float32"
    assert recipe["entries"]["retrieve"]["linears"]["item_head"] == "float32"
    stored = {t.data_type for t in onnx.load(artifact.file("rank.onnx"), load_external_data=False).graph.initializer}
    wanted = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16, "int8": onnx.TensorProto.INT8}
    assert narrow == "float32" or wanted[narrow] in stored
    if precision == "int8":
        scales = recipe["entries"]["rank"]["scales"]
        assert set(scales) == {name for name, kind in linears.items() if kind == "int8"}
        assert all(0 <= scale["held_out_error"] < 0.2 and scale["scale"] > 0 for scale in scales.values())
    assert ("emulated" in recipe["entries"]["rank"]) == (precision == "bf16")


def test_narrow_weights_make_a_smaller_file(inputs: dict[str, Artifact], engine: tuple[Artifact, Outcome]) -> None:
    artifact, _ = engine
    size, wide = (a.file("weights.bin").stat().st_size for a in (artifact, inputs["surgery"]))
    assert size <= {"fp32": 1.0, "fp16": 0.6, "bf16": 0.6, "int8": 0.95}[read_spec(artifact.path).precision] * wide


def test_the_same_inputs_give_the_same_bytes(
    engine: tuple[Artifact, Outcome], inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    artifact, outcome = engine
    again, outcome_again = make(tmp_path / "again", BuildEngineParams(**artifact.params), inputs)
    assert again.id == artifact.id
    assert outcome_again.metrics == outcome.metrics


@pytest.mark.parametrize(
    ("backend", "rows", "packed"),
    [("onnxruntime", "packed", True), ("openvino", "auto", True), ("openvino", "padded", False)],
)
def test_rows_may_be_packed(inputs: dict[str, Artifact], tmp_path: Path, backend: str, rows: str, packed: bool) -> None:
    artifact, outcome = make(tmp_path / "engine", params("fp32", backend=backend, rows=rows), inputs)
    assert outcome.platform is not None
    assert outcome.platform["rows"] == ("packed" if packed else "padded")
    assert json.loads(artifact.file("recipe.json").read_text())["recipe"]["packed"] == packed
    made = {name for node in onnx.load(artifact.file("retrieve.onnx")).graph.node for name in node.output}
    assert ("packing.rows" in made) == packed


def test_rows_cannot_be_packed_without_the_pass(exported: Artifact, checkpoint: Artifact, tmp_path: Path) -> None:
    inputs = {"surgery": operate(exported, tmp_path / "surgery", ("fold_constants",)), "checkpoint": checkpoint}
    _, outcome = make(tmp_path / "auto", params("fp32", evaluation_histories=4), inputs)
    assert outcome.platform is not None
    assert outcome.platform["rows"] == "padded"
    with pytest.raises(ParameterError, match="surgery has packed no graphs"):
        make(tmp_path / "packed", params("fp32", rows="packed"), inputs)


def test_an_engine_that_fails_its_gate_is_refused_with_the_figures(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"lowest cosine of a user embedding 0\.\d+ < 0\.99999") as caught:
        make(tmp_path / "int8", params("int8", min_cosine=0.99999), inputs)
    assert caught.value.exit_code == 5
    assert "int8_keep_wide" in str(caught.value)


def test_a_damaged_graph_does_not_pass(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    broken = tmp_path / "surgery"
    broken.mkdir()
    for file in inputs["surgery"].path.iterdir():
        data = bytearray(file.read_bytes())
        if file.name == "weights.bin":
            data[:4096] = np.full(1024, np.float32(0.1)).tobytes()
        (broken / file.name).write_bytes(data)
    damaged = replace(inputs["surgery"], path=broken)
    with pytest.raises(GateError, match="does not pass its gate"):
        make(tmp_path / "fp32", params("fp32"), {**inputs, "surgery": damaged})


def test_openvino_gets_its_kernels_and_bf16_around_int8(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    artifact, outcome = make(tmp_path / "int8", params("int8", backend="openvino"), inputs)
    assert LIBRARY in artifact.manifest["files"]
    assert outcome.platform is not None
    assert (outcome.platform["product"], outcome.platform["executed"]) == ("OpenVINO", True)
    recipe = json.loads(artifact.file("recipe.json").read_text())
    assert (recipe["recipe"]["around"], recipe["entries"]["rank"]["attention"]) == ("bf16", "bfloat16")
    assert recipe["entries"]["rank"]["linears"]["layers.0.output"] == "bfloat16"


def test_auto_says_what_it_chose(
    inputs: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = params("fp16", backend="auto")
    assert (build_engine.variant(chosen), build_engine.variant(params("int8"))) == ("fp16", "int8-onnxruntime")
    _, outcome = make(tmp_path / "fp16", chosen, inputs)
    captured = capsys.readouterr()
    assert not captured.out
    assert outcome.platform is not None
    assert outcome.platform["product"] in captured.err
    assert outcome.platform["chosen_because"] in captured.err
    assert "OpenVINO has no fp16" in outcome.platform["chosen_because"]


def test_auto_takes_the_first_that_is_here() -> None:
    first = "tensorrt" if has_module(TENSORRT) else "openvino"
    assert choose("auto", "int8")[0].backend == first


def test_a_precision_that_a_backend_has_not(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="OpenVINO has no fp16"):
        make(tmp_path / "fp16", params("fp16", backend="openvino"), inputs)


@pytest.mark.skipif(has_module(TENSORRT), reason="TensorRT is installed here")
def test_a_backend_that_is_not_here_is_an_error(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(MissingBackendError, match="TensorRT is not installed") as caught:
        make(tmp_path / "fp16", params("fp16", backend="tensorrt"), inputs)
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "fp16").iterdir())


def test_unknown_linears_are_named(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"int8_keep_wide: no such linear 'outputs'"):
        make(tmp_path / "int8", params("int8", int8_keep_wide=("outputs",)), inputs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"calibration_histories": 1},
        {"calibration_percentile": 20.0},
        {"min_cosine": 1.5},
        {"optimization_level": 6},
        {"workspace_mib": 0},
        {"profiles": ("single", "batch")},
        {"profiles": ("all", "all")},
    ],
)
def test_parameters_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        replace(PARAMS, **wrong)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_tensorrt_rtx_builds_every_precision(precision: str, inputs: dict[str, Artifact], tmp_path: Path) -> None:
    artifact, outcome = make(tmp_path / "engine", params(precision, backend="tensorrt-rtx"), inputs)
    assert outcome.platform is not None
    assert (outcome.platform["product"], outcome.platform["executed"]) == ("TensorRT-RTX", False)
    assert read_spec(artifact.path).entries == {name: f"{name}.rtx" for name in entry_names(TINY)}
    models = read_models(artifact.path, ["retrieve", "rank"])
    if precision == "bf16":  # the graph is bf16 itself, not the one that ONNX Runtime gets
        attention = next(node for node in models["rank"].graph.node if node.domain == "hstu")
        types = {v.name: v.type.tensor_type.elem_type for v in models["rank"].graph.value_info}
        assert types[attention.output[0]] == onnx.TensorProto.BFLOAT16
    with pytest.raises(MissingBackendError, match="no"):
        open_engine(artifact.path)


def test_tensorrt_rtx_builds_are_the_same_bytes(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    settings = BuildSettings(profiles=("all",))
    for name in ("rank", "extend"):
        engines = set()
        for folder in ("one", "another/one"):  # where it is built does not matter
            path = tmp_path / folder
            path.mkdir(parents=True, exist_ok=True)
            for file in (f"{name}.onnx", "weights.bin"):
                shutil.copyfile(inputs["surgery"].file(file), path / file)
            build(TENSORRT_RTX, path / f"{name}.onnx", path / "engine.rtx", TINY, name, settings)  # type: ignore[arg-type]
            engines.add((path / "engine.rtx").read_bytes())
        # Where threads may not be put in order, they change a few dozen bytes of some graphs.
        few = not may_order_threads()
        assert len(engines) == 1 or (few and sum(a != b for a, b in zip(*engines, strict=True)) < 100)


def test_rejections_carry_nvidias_reason(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    model = read_models(inputs["surgery"].path, ["retrieve"])["retrieve"]
    head = next(node for node in model.graph.node if node.op_type == "Gemm")
    position = list(model.graph.node).index(head)
    strange = onnx.helper.make_node("Det", [head.input[0]], ["strange"], name="somewhere/Strange", domain="no.such")
    model.graph.node.insert(position, strange)
    model.opset_import.append(onnx.helper.make_opsetid("no.such", 1))
    head.input[0] = "strange"
    path = tmp_path / "retrieve.onnx"
    onnx.save(model, path)
    with pytest.raises(RejectedError, match=r"somewhere/Strange") as caught:
        build(
            TENSORRT_RTX, path, tmp_path / "x.rtx", TINY, "retrieve",
            BuildSettings(tf32=False, optimization_level=0, workspace_mib=64),
        )  # fmt: skip
    assert caught.value.reasons


def test_int8_widens_what_is_most_sensitive_until_it_passes(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    loose = params("int8", max_abs_error=1.0, min_top10_overlap=0.0, min_cosine=0.0, max_quality_loss=1.0)
    loose = replace(loose, min_mean_cosine=0.0)
    mean = make(tmp_path / "loose", loose, inputs)[1].metrics["embedding_cosine"]["mean"]
    limit = 1.0 - 0.9 * (1.0 - mean)
    chosen = replace(loose, min_mean_cosine=limit)
    with pytest.raises(GateError):
        make(tmp_path / "refused", chosen, inputs)
    artifact, outcome = make(tmp_path / "kept", replace(chosen, int8_widen_at_most=4), inputs)
    recipe = json.loads(artifact.file("recipe.json").read_text())
    widened = [name for name in recipe["recipe"]["int8_keep_wide"] if name not in chosen.int8_keep_wide]
    sensitivity = recipe["sensitivity"]
    assert outcome.platform is not None  # which the manifest holds
    assert outcome.platform["int8_search"] == {
        "kept_wide": recipe["recipe"]["int8_keep_wide"],
        "sensitivity": sensitivity,
    }
    assert widened == sorted(sensitivity, key=lambda module: -sensitivity[module])[: len(widened)] != []
    linears = recipe["entries"]["retrieve"]["linears"]
    assert all(kind == "float32" for name, kind in linears.items() if name.partition("#")[0] in widened)
    assert outcome.metrics["embedding_cosine"]["mean"] >= limit


def test_only_tensorrt_has_the_attention_plugin(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    params = replace(PARAMS, tensorrt_attention="plugin")
    with pytest.raises(ParameterError, match="only TensorRT has the attention plugin"):
        build_engine.run(params, inputs, tmp_path)
    assert build_engine.variant(params) == "fp32-onnxruntime-plugin"
