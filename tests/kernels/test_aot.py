"""Kernels compiled without a GPU: sound, the same bytes every time, and launched with the arguments they expect."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernels import aot, tuning
from kernels.artifacts import CompiledKernel, CompiledKernels
from kernels.bench import __main__ as bench
from kernels.catalogue import OPS, catalogue
from kernels.errors import KernelError
from kernels.spec import SHARED_LIMIT, Config, Kernel, Launch, configs_for

SAMPLE = ("hstu_attention-bf16-d64", "hstu_attention-bf16-d64-tma", "paged_hstu_attention-decode-bf16-d64-bias")


def kernels_named(*names: str) -> list[Kernel]:
    found = {kernel.name: kernel for kernel in catalogue(("bf16", "fp16", "fp32"), (32, 64, 128))}
    return [found[name] for name in names]


def sound(compiled: aot.Compiled) -> None:
    """What every shipped kernel must show."""
    description, sm = compiled.description, compiled.description["sm"]
    assert not compiled.faults
    assert description["spills"] == description["local_bytes"] == description["stack_bytes"] == 0
    assert description["shared_bytes"] <= SHARED_LIMIT[sm]
    assert description["scratch_bytes"] == {"global": 0, "profile": 0}
    half = not re.search("fp32", description["kernel"])
    product = description["op"] == "uvqk_silu" or re.search("hstu_attention-(bf|fp|extend)", description["kernel"])
    if half and product:
        kind = "warpgroup_products" if sm >= 90 else "warp_products"
        assert description["instructions"][kind] > 0, description["kernel"]
    if half and (product or "decode" in description["kernel"]):
        assert description["instructions"]["tanh"] > 0
        assert "tanh.approx.f32" in compiled.ptx


@pytest.fixture(scope="module")
def sample() -> list[aot.Compiled]:
    work = [(kernel, 90) for kernel in kernels_named(*SAMPLE)]
    table = {"runs": [], "schema": 1}
    return [one for one, _ in tuning.build(work, processes=2, every_config=False, table=table)]


def test_compiled_kernels_are_sound(sample: list[aot.Compiled]) -> None:
    assert {one.description["kernel"] for one in sample} == set(SAMPLE)
    for one in sample:
        sound(one)
        assert one.description["chosen"] == tuning.UNMEASURED
        assert one.description["ptx_target"] == "sm_90a"


def test_compiling_again_gives_the_same_bytes(sample: list[aot.Compiled]) -> None:
    chosen = next(one for one in sample if one.description["kernel"] == SAMPLE[0])
    kernel = kernels_named(SAMPLE[0])[0]
    config = next(c for c in kernel.configs if c.label() == chosen.description["config"])
    (again,) = aot.compile_all([(kernel, config, 90)], processes=1)
    assert again.cubin == chosen.cubin
    assert again.ptx == chosen.ptx
    assert "/" not in re.sub(r"//.*", "", again.ptx), "a path is in the bytes"


def test_descriptions_name_the_kernel_s_parameters(sample: list[aot.Compiled]) -> None:
    """Every parameter of the PTX is one argument, in order, and the last two are Triton's empty scratch areas."""
    widths = {"i32": "u32", "i64": "u64", "fp32": "f32"}
    for one in sample:
        expected: list[str] = []
        for argument in one.description["arguments"]:
            if argument["type"].startswith("tensordesc"):
                expected += ["b8", "u32", "u32", "u64", "u64"]
            else:
                expected.append(widths.get(argument["type"], "u64"))
        entry = one.ptx.split(f".entry {one.description['entry']}(")[1].split(")")[0]
        assert re.findall(r"\.param (?:\.align \d+ )?\.(\w+)", entry) == [*expected, "u64", "u64"]
        body = one.ptx.split(".reqntid")[1]
        for place in (len(expected), len(expected) + 1):
            assert f"_param_{place}]" not in body, "a scratch area is read"


@pytest.mark.slow
@pytest.mark.parametrize("sm", sorted(SHARED_LIMIT))
def test_every_kernel_of_the_catalogue_is_sound(sm: int) -> None:
    kernels = [kernel for kernel in catalogue(("bf16", "fp16", "fp32"), (32, 64, 128)) if sm >= kernel.lowest_sm]
    table = {"runs": [], "schema": 1}
    built = list(tuning.build([(k, sm) for k in kernels], processes=2, every_config=False, table=table))
    assert len(built) == len(kernels)
    for one, ships in built:
        assert ships
        sound(one)


def test_the_catalogue_names_every_kernel_once() -> None:
    kernels = catalogue(("bf16", "fp16", "fp32"), (32, 64, 128))
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    assert {kernel.op for kernel in kernels} == set(OPS)
    for kernel in kernels:
        for sm in SHARED_LIMIT:
            labels = [config.label() for config in configs_for(kernel, sm)]
            assert len(set(labels)) == len(labels) > 0


def test_measured_times_rank_configs_on_their_own_sm_alone(tmp_path: Path) -> None:
    (kernel,) = kernels_named("hstu_attention-bf16-d64")
    slow, fast = kernel.configs[0], kernel.configs[3]
    path = tmp_path / "measured.json"
    path.write_text('{"runs": [], "schema": 1}')
    device = {"device": "A GPU", "sm": 90, "driver": "1.2", "torch": "2", "triton": "3"}
    times = {kernel.name: {slow.label(): 20.0, fast.label(): 10.0}}
    for _ in range(2):
        tuning.adopt({"device": device, "sweep": times}, "reports/gpu/a.json", path)
    table = tuning.read_table(path)
    assert len(table["runs"]) == 1
    order, why = tuning.ranked(kernel, 90, table)
    assert order[:2] == [fast, slow]
    assert len(order) == len(kernel.configs)
    assert why == "measured on A GPU, driver 1.2: reports/gpu/a.json"
    assert tuning.ranked(kernel, 100, table) == (list(kernel.configs), tuning.UNMEASURED)


def test_the_committed_table_names_its_sources() -> None:
    for run in tuning.read_table()["runs"]:
        report = Path(__file__).parents[2] / run["report"]
        assert json.loads(report.read_text())["sweep"] == run["times_us"]


def test_an_unsound_kernel_is_refused_with_every_config_s_fault() -> None:
    (kernel,) = kernels_named("embedding_bag-bf16-d128")
    changes = {"configs": (Config({"BAGS": 1, "STAGES": 2}, 1, 2),), "matrix": True}
    values = {name: getattr(kernel, name) for name in kernel.__slots__} | changes
    with pytest.raises(KernelError, match=r"no config is sound on sm_90\n.*BAGS1-STAGES2-w1-s2: no warpgroup product"):
        list(tuning.build([(Kernel(**values), 90)], processes=1, every_config=False, table={"runs": []}))


def test_the_interpreter_is_not_taken_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError, match="unset TRITON_INTERPRET"):
        aot.check_environment()


@pytest.fixture
def folder(sample: list[aot.Compiled], tmp_path: Path) -> Path:
    (tmp_path / "sm_90").mkdir()
    for one in sample:
        place = tmp_path / "sm_90" / one.description["kernel"]
        place.with_suffix(".json").write_text(json.dumps(dict(one.description)))
        place.with_suffix(".cubin").write_bytes(one.cubin)
    return tmp_path


def test_a_dry_run_names_every_task_and_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--kernels", str(folder)]
    assert bench.main(arguments) == 0
    tasks = capsys.readouterr().out.splitlines()
    assert [task for task in tasks if task.startswith("check")] == [f"check {name}" for name in sorted(SAMPLE)]
    assert any(task.startswith("time attention-tma bf16 B32 H8 D64 N2048") for task in tasks)
    assert bench.main([*arguments, "--cutlass", str(folder)]) == 1
    said = capsys.readouterr()
    assert "missing" in said.err
    assert "no library of today's hstu_attention-bf16-d64" in said.err
    assert "check cutlass interaction-bf16" in said.out.splitlines()
    assert bench.main([*arguments, "--sm", "80"]) == 2


def values_for(description: dict[str, Any]) -> dict[str, Any]:
    return {
        a["name"]: SimpleNamespace(data_ptr=lambda: 4096) if a["type"].startswith("*") else 16
        for a in description["arguments"]
    }


def test_arguments_and_grid_are_prepared_without_a_gpu(folder: Path) -> None:
    kernel = CompiledKernels(folder, sm=90).kernel("hstu_attention-bf16-d64")
    values = values_for(kernel.description)
    grid, arguments = kernel.prepare(Launch("", values, {"longest": 1000, "heads": 4, "users": 3}))
    rows = kernel.description["constants"]["BLOCK_M"]
    assert grid == [-(-1000 // rows), 4, 3]
    assert len(arguments) == len(kernel.description["arguments"]) + 2
    assert [type(a) for a in arguments[-4:]] == [ctypes.c_int32, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p]


@pytest.mark.parametrize(
    ("values", "sizes", "message"),
    [
        ({"q": SimpleNamespace(data_ptr=lambda: 4098)}, {}, "q is at an address that 16 does not divide"),
        ({"k_row": 100}, {}, "k_row is a number that 16 does not divide"),
        ({}, {"users": 0}, "users is out of range"),
        ({}, {"users": 65536}, "users is out of range"),
        ({}, {"longest": 1 << 21}, "longest is out of range"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused(
    folder: Path, values: dict[str, Any], sizes: dict[str, int], message: str
) -> None:
    kernel: CompiledKernel = CompiledKernels(folder, sm=90).kernel("hstu_attention-bf16-d64")
    launch = Launch("", values_for(kernel.description) | values, {"longest": 8, "heads": 4, "users": 3} | sizes)
    with pytest.raises(KernelError, match=message):
        kernel.prepare(launch)


def test_a_missing_artifact_is_a_clear_error(folder: Path) -> None:
    with pytest.raises(KernelError, match=r"no kernels for sm_100\n.*sm_90"):
        CompiledKernels(folder, sm=100)
    with pytest.raises(KernelError, match="there is no kernel hstu_attention-bf16-d48"):
        CompiledKernels(folder, sm=90).kernel("hstu_attention-bf16-d48")
