"""The attention plugin: its graph, its kernel's ABI, its registration in NVIDIA's own front end; nothing of it ran."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from hstu.artifact import Artifact
from hstu.config import HSTUConfig
from hstu.errors import ParameterError
from hstu.signature import EntryName
from kernels import aot
from kernels.errors import KernelError
from kernels.hstu_attention.variants import padded
from kernels.ptx import without_scratch
from kernels.spec import SHARED_LIMIT
from kernels.tuning import build
from serving.engines.tensorrt_facts import Device
from stages.onnx_files import read_graph
from stages.precision.recipe import Recipe, lower_entry, write_models
from stages.tensorrt.builder import BuildSettings
from stages.tensorrt.engine import _with_plugin, compile_entries
from stages.tensorrt.plugin_graph import write_plugin_graph
from stages.tensorrt.plugin_kernel import write_kernel
from stages.tensorrt.products import TENSORRT, TENSORRT_RTX
from tests.models import TINY, random_histories, tiny_config
from tests.stages.tensorrt.bindings import MISSING, write_libraries
from tests.stages.tensorrt.front_end import HEADS, LONGEST, ROWS, USERS, WIDTH

ROOT = Path(__file__).parents[3]
ENTRIES: tuple[EntryName, ...] = ("retrieve", "rank", "extend")
PLUGIN = BuildSettings(tensorrt_attention="plugin")
H200 = Device(name="NVIDIA H200", sm="9.0", cuda="13.0", driver_cuda="13.0")


def lowered(surgery: Artifact, folder: Path, precision: str) -> Path:
    """An engine folder with the graphs that TensorRT gets at a precision, and those with the plugin."""
    folder.mkdir()
    shutil.copyfile(surgery.path / "config.json", folder / "config.json")
    recipe = Recipe(
        precision=precision, around="fp32", float_keep_wide=("hidden", "logits"), int8_keep_wide=(), method="max",
        percentile=100.0,
    )  # fmt: skip
    histories = random_histories(TINY, num_users=4)
    models = {
        n: lower_entry(surgery.path, n, TINY, recipe, histories, emulated=False)[0]
        for n in ("retrieve", "rank", "extend")
    }
    write_models(models, folder)
    return folder


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_a_graph_with_the_plugin_answers_as_without(
    surgered: Artifact, tmp_path: Path, precision: str, limit: float
) -> None:
    folder = lowered(surgered, tmp_path / precision, precision)
    written = {name: write_plugin_graph(folder, name, TINY) for name in ENTRIES}
    assert written["extend"] == ("extend.onnx", None)
    assert written["retrieve"] == ("retrieve.plugin.onnx", precision)
    for name, calls in (("retrieve", 1), ("rank", 1)):
        model = read_graph(folder, f"{name}.plugin")
        assert sum(node.op_type == "HSTUPaddedAttention" for node in model.graph.node) == calls
        assert "HSTUAttention" not in {function.name for function in model.functions}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.tensorrt.interpreted_plugin", str(folder)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one.pop("entry") for one in told] == ["rank", "retrieve"]
    assert {name for one in told for name in one} == {"user_embedding", "top_scores", "task_scores"}
    for one in told:
        assert max(one.values()) <= limit, one


def test_no_pair_of_events_is_left_outside_the_plugin(surgered: Artifact, tmp_path: Path) -> None:
    """What retrieve's last layer reads of time buckets is computed for the row it reads."""
    folder = lowered(surgered, tmp_path / "fp32", "fp32")
    write_plugin_graph(folder, "retrieve", TINY)
    model = onnx.shape_inference.infer_shapes(read_graph(folder, "retrieve.plugin"))
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.value_info, *model.graph.input)
    }
    made = {output: node for node in model.graph.node for output in node.output}
    (logarithm,) = (node for node in model.graph.node if node.op_type == "Log" and len(shapes[node.output[0]]) == 3)
    assert shapes[logarithm.output[0]][1] == 1, shapes[logarithm.output[0]]
    assert any(node.name.endswith("/next_times") for node in made.values())


def compiled(*sms: int) -> list[aot.Compiled]:
    """The plugin's kernel, fp16 with heads of 32."""
    work = [(padded("fp16", WIDTH), sm) for sm in sms]
    return [one for one, _ in build(work, processes=2, every_config=False, table={"runs": [], "schema": 1})]


@pytest.mark.parametrize("sms", [(80, 90), pytest.param(tuple(sorted(SHARED_LIMIT)), marks=pytest.mark.slow)], ids=str)
def test_the_kernel_takes_what_tensorrt_passes(sms: tuple[int, ...], tmp_path: Path) -> None:
    """Inputs, whole numbers, outputs, and nothing else: in the PTX, and in what NVIDIA's assembler makes of it."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    made = compiled(*sms)
    assert [one.description["sm"] for one in made] == list(sms)
    for one in made:
        told, sm = one.description, one.description["sm"]
        assert told["scratch_bytes"] == {"global": 0, "profile": 0}
        assert told["shared_bytes"] <= 48 * 1024
        assert told["threads"] == 32 * told["num_warps"]
        assert told["tensor_maps"] == []
        assert [a["name"] for a in told["arguments"] if a["aligned"]] == [
            "uvqk", "position_bias", "time_bias", "bucket_edges", "out",
        ]  # fmt: skip
        ptx = without_scratch(one.ptx, told["entry"], [a["type"] for a in told["arguments"]])
        declared = ptx.split(f".entry {told['entry']}(")[1].split(")")[0]
        widths = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)", declared)
        assert widths == [*["u64"] * 7, *["u32"] * 3, "u64"]
        assert f".target sm_{sm}" in ptx
        (tmp_path / "k.ptx").write_text(ptx)
        assembler = tools / ("ptxas-blackwell" if sm >= 100 else "ptxas")
        target = re.search(r"^\.target (\S+)", ptx, re.MULTILINE)
        assert target is not None
        command = [assembler, f"-arch={target[1]}", str(tmp_path / "k.ptx"), "-o", str(tmp_path / "k.cubin")]
        subprocess.run(command, check=True, capture_output=True)
        listed = subprocess.run(
            [tools / "cuobjdump", "-elf", str(tmp_path / "k.cubin")], check=True, capture_output=True, text=True
        ).stdout
        sizes = {int(o, 16): int(s, 16) for o, s in re.findall(r"Ordinal\s*:\s*(0x\w+).*?Size\s*:\s*(0x\w+)", listed)}
        assert [sizes[place] for place in sorted(sizes)] == [*[8] * 7, *[4] * 3, 8], listed[-1500:]
        types = [argument["type"] for argument in told["arguments"]]
        read = one.ptx.replace("\tret;", f"\tld.param.b64 %rd1, [{told['entry']}_param_{len(types)}];\n\tret;", 1)
        with pytest.raises(KernelError, match="reads its scratch area"):
            without_scratch(read, told["entry"], types)
        with pytest.raises(KernelError, match="not these parameters"):
            without_scratch(one.ptx, told["entry"], types[1:])


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_nvidias_front_end_takes_the_plugin(surgered: Artifact, tmp_path: Path) -> None:
    """Registered, instantiated ahead of time, asked for shapes, types, launch and kernel; found by NVIDIA's parser."""
    kernel, libraries = tmp_path / "kernel", tmp_path / "libraries"
    kernel.mkdir()
    libraries.mkdir()
    folder = lowered(surgered, tmp_path / "fp16", "fp16")
    write_plugin_graph(folder, "retrieve", TINY)
    files = write_kernel(kernel, tiny_config(qk_dim=WIDTH, v_dim=WIDTH), "fp16", 90)
    told = front_end(write_libraries(libraries), kernel, folder / "retrieve.plugin.onnx")
    description = json.loads((kernel / "attention_plugin.json").read_text())
    rows = description["constants"]["BLOCK_M"]
    assert told["refused"].startswith("hstu::HSTUPaddedAttention: the kernel takes")
    assert told["creator"] == "HSTUPaddedAttention"
    assert told["aot"]
    assert (told["type"], told["shape"]) == ("HALF", [USERS, ROWS, HEADS * WIDTH])
    assert told["formats"] == ["FLOAT LINEAR", "HALF LINEAR", "INT64 LINEAR"]
    assert told["launch"] == {
        "grid_x": -(-ROWS // rows), "grid_y": USERS, "grid_z": 1, "block_x": description["threads"], "block_y": 1,
        "block_z": 1, "shared_mem": description["shared_bytes"],
    }  # fmt: skip
    assert told["numbers"] == [["ShapeExpr", ROWS], ["SymInt32", HEADS], ["SymInt32", LONGEST]]
    assert told["kernel"] == description["entry"]
    assert told["ptx_sha256"] == files["attention_plugin.ptx"]
    # The parser that answers is TensorRT-RTX's: it finds the plugin, and says that it takes none of this kind.
    assert not told["parsed"]
    assert [re.sub(".*: ", "", text) for text in told["errors"]] == [
        "TensorRT-RTX imports IPluginV3 plugins registered with an IPluginCreatorV3One creator only."
    ]


def front_end(*arguments: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.tensorrt.front_end", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_an_engine_folder_holds_what_the_plugin_is_made_of(surgered: Artifact, tmp_path: Path) -> None:
    folder = lowered(surgered, tmp_path / "bf16", "bf16")
    sources, plugins = _with_plugin(folder, TINY, PLUGIN, TENSORRT, H200)
    assert sources == {"retrieve": "retrieve.plugin.onnx", "rank": "rank.plugin.onnx", "extend": "extend.onnx"}
    assert sorted(plugins) == ["attention_plugin.json", "attention_plugin.ptx"]
    for name, digest in plugins.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    again = _with_plugin(lowered(surgered, tmp_path / "again", "bf16"), TINY, PLUGIN, TENSORRT, H200)
    assert again == (sources, plugins)


def test_engines_that_have_no_plugin(surgered: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="TensorRT-RTX"):
        compile_entries(TENSORRT_RTX, tmp_path, TINY, PLUGIN, timing_caches=None)
    stripped = BuildSettings(tensorrt_attention="plugin", strip_plan=True)
    with pytest.raises(ParameterError, match="plugin with strip_plan"):
        _with_plugin(tmp_path, TINY, stripped, TENSORRT, H200)
    wrong: list[tuple[HSTUConfig, int, str]] = [(TINY, 86, "sm_86"), (tiny_config(v_dim=300), 90, "v_dim 300")]
    for config, sm, message in wrong:
        with pytest.raises(ParameterError, match=message):
            write_kernel(tmp_path, config, "fp16", sm)
