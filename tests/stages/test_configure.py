"""Configure: the file keeps its words, changes only what the machine decides, and still passes every check."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

import pytest

from hstu.errors import ParameterError
from stages.configure import RULES, Machine, fitted_params, this_machine, write_fitted_params
from stages.parameters import load_params, read_params

ROOT = Path(__file__).parents[2]
SMALL = Machine(cpu="a processor", cores=2, memory_mib=8192, isa=frozenset({"avx2"}))
VNNI = dataclasses.replace(SMALL, cores=32, memory_mib=65536, isa=frozenset({"avx2", "avx512_vnni"}))
H200 = dataclasses.replace(VNNI, gpu="NVIDIA H200", gpu_sm=9.0, gpu_memory_mib=143771, tensorrt=True)
MACHINES = {"small": SMALL, "vnni": VNNI, "h200": H200, "no tensorrt": dataclasses.replace(H200, tensorrt=False)}
TEXT = """\
# a comment that stays
checkpoint:
  reference_threads: 2 # of training
  rate: 1e-3 # a number as it was written
  path: null

build-engine:
  backend: auto
  workspace_mib: 4096 # MiB
bundle:
  engines: [fp32, fp16] # which
  default_engine: 'fp32'
  kv_cache_mib: 512
benchmark:
  cases: [trained, small]
  threads: [one, all]
gate:
  max_slowdown: 0.2
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    return path


def changed_lines(before: str, after: str) -> list[str]:
    return [line[2:] for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line.startswith("+ ")]


def test_every_rule_speaks_of_a_key_it_finds(base: Path) -> None:
    fitted = fitted_params(base, VNNI)
    assert [choice.name for choice in fitted.choices] == list(RULES)
    assert all(choice.why for choice in fitted.choices)


def test_only_what_was_chosen_changes(base: Path) -> None:
    fitted = fitted_params(base, VNNI)
    assert changed_lines(TEXT, fitted.text) == [
        "  reference_threads: 8 # of training",
        "  engines: [fp32, int8] # which",
        "  kv_cache_mib: 8192",
        "  cases: [trained, small, reference-512]",
    ]
    told = {choice.name: choice.after for choice in fitted.choices if choice.after != choice.before}
    assert told == {
        "checkpoint.reference_threads": 8,
        "bundle.engines": ["fp32", "int8"],
        "bundle.kv_cache_mib": 8192,
        "benchmark.cases": ["trained", "small", "reference-512"],
    }
    assert "checkpoint.reference_threads: 2 → 8" in fitted.report


@pytest.mark.parametrize("name", MACHINES)
def test_the_default_engine_is_among_the_engines(base: Path, name: str, tmp_path: Path) -> None:
    fitted = fitted_params(base, MACHINES[name])
    chosen = {choice.name: choice.after for choice in fitted.choices}
    assert chosen["bundle.default_engine"] in chosen["bundle.engines"]
    (tmp_path / "again.yaml").write_text(fitted.text)
    assert fitted_params(tmp_path / "again.yaml", MACHINES[name]).text == fitted.text


def test_precisions_are_those_that_pay(base: Path) -> None:
    def engines(machine: Machine) -> list[str]:
        return next(c.after for c in fitted_params(base, machine).choices if c.name == "bundle.engines")

    assert engines(SMALL) == ["fp32"]
    assert engines(VNNI) == ["fp32", "int8"]
    assert engines(H200) == ["fp32", "fp16", "bf16", "int8"]
    assert engines(dataclasses.replace(H200, gpu_sm=7.5)) == ["fp32", "fp16", "int8"]
    assert engines(MACHINES["no tensorrt"]) == ["fp32", "int8"]  # engines run on the processor there


def test_one_core_measures_on_one_thread(base: Path) -> None:
    fitted = fitted_params(base, dataclasses.replace(SMALL, cores=1))
    assert "  threads: [one]" in fitted.text.splitlines()
    assert "  reference_threads: 1 # of training" in fitted.text.splitlines()


@pytest.mark.parametrize("name", MACHINES)
def test_the_projects_own_file_passes_every_check(tmp_path: Path, name: str) -> None:
    from stages.pipeline import PIPELINE

    fitted = fitted_params(ROOT / "params.yaml", MACHINES[name])
    path = tmp_path / "params.yaml"
    path.write_text(fitted.text)
    values = read_params(path)
    original = read_params(ROOT / "params.yaml")
    changed = {c.name for c in fitted.choices if c.after != c.before}
    for stage in (stage for stage in PIPELINE if stage.name in values):
        load_params(stage.params, values[stage.name], section=stage.name)
    assert {
        f"{section}.{key}" for section in original for key in original[section]
        if original[section][key] != values[section][key]
    } == changed  # fmt: skip
    assert len(changed_lines((ROOT / "params.yaml").read_text(), fitted.text)) == len(changed)


def test_this_machine_is_read() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_mib > 0
    assert (machine.gpu is None) == (machine.gpu_memory_mib == 0)


def test_hints_fit_the_machine(base: Path) -> None:
    assert "VLLM_CPU_KVCACHE_SPACE=2" in fitted_params(base, SMALL).report
    assert "--gpu-memory-utilization" in fitted_params(base, H200).report
    assert fitted_params(base, SMALL).to_dict()["hints"]


def test_nothing_is_overwritten_unasked(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "fitted.yaml"
    fitted = write_fitted_params(base, target)
    assert target.read_text() == fitted.text
    with pytest.raises(ParameterError, match="stands already"):
        write_fitted_params(base, target)
    write_fitted_params(base, target, overwrite=True)
    with pytest.raises(ParameterError, match="cannot be written"):
        write_fitted_params(base, tmp_path / "nowhere" / "x.yaml")


def test_what_is_no_params_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("- 1\n")
    with pytest.raises(ParameterError, match="not a params file"):
        fitted_params(tmp_path / "params.yaml", SMALL)
