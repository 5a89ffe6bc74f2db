"""The command line: what users type, the exit codes they get, and that nothing on it contradicts the pipeline."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import cli
from stages.pipeline import PIPELINE

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "onnx", "onnxruntime", "transformers", "vllm", "tensorrt_rtx", "openvino", "pyarrow", "dvc")


def run_cli(*arguments: str, stdin: str | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        cwd=cwd,
        check=False,
        timeout=300,
    )


def test_pipeline_params_dvc_and_commands_are_the_same():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    dvc = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    names = [stage.name for stage in PIPELINE]
    assert [name for name in dvc if name in names] == names, "dvc.yaml has the stages in the pipeline's order"
    assert set(dvc) - set(names) == {"machine", "portable", "conformance"}
    assert [name for name in params if name in names] == names
    for stage in PIPELINE:
        assert list(params[stage.name]) == [field.name for field in dataclasses.fields(stage.params)], stage.name
        assert dvc[stage.name]["cmd"].startswith(f"python cli.py {stage.name}")
        assert dvc[stage.name]["params"] == [stage.name]


def test_dvc_dependencies_exist_and_cover_what_a_stage_needs():
    dvc = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in PIPELINE:
        deps = dvc[stage.name]["deps"]
        for dep in deps:
            assert dep.startswith("artifacts/") or dep == "reports/machine.json" or (ROOT / dep).exists(), dep
        for need in stage.needs:
            prefix = f"artifacts/{need.partition('/')[0]}"
            assert any(dep == prefix or dep.startswith(prefix + "/") for dep in deps), (stage.name, need)


def test_the_reference_in_docs_is_the_commands_own():
    done = run_cli("reference")
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs" / "CLI.md").read_text() == done.stdout, "run `make docs`"


def test_help_loads_nothing_heavy():
    code = f"import sys, cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_stage_has_an_option_for_each_parameter():
    help_text = (ROOT / "docs" / "CLI.md").read_text()
    for stage in PIPELINE:
        if stage.name == "benchmark":
            continue
        section = help_text.split(f"\n## {stage.name}\n")[1].split("\n## ")[0]
        for field in dataclasses.fields(stage.params):
            assert f"--{field.name.replace('_', '-')}" in section, (stage.name, field.name)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("prepare-data", "--seed=none"), 2, "prepare-data.seed: wrong type"),
        (("prepare-data", "-S", "prepare-data.sead=3"), 2, "did you mean 'seed'?"),
        (("prepare-data", "-S", "prepar-data.seed=3"), 2, "did you mean 'prepare-data'?"),
        (("prepare-data", "-S", "nonsense"), 2, "section.key=value"),
        (("--params", "nowhere.yaml", "prepare-data"), 2, "nowhere.yaml: cannot be read"),
        (("build-engine", "--precision=int4"), 2, "build-engine.precision: not one of its values"),
        (("verify", "nowhere"), 4, "there is no artifact here"),
        (("lineage", "nowhere"), 4, "there is no artifact here"),
        (("recommend", "--input", "nowhere.jsonl"), 2, "nowhere.jsonl: cannot be read"),
        (("compile", "--until", "bundel"), 2, "there is no stage 'bundel'"),
        (("nonsense",), 2, "No such command"),
        (("estimate", "--precision", "fp4"), 2, "precision"),
    ],
)
def test_bad_usage_is_one_message_and_an_exit_code(arguments, code, message, tmp_path):
    done = run_cli(*arguments, "--artifacts", str(tmp_path / "a"), "--reports", str(tmp_path / "r")) \
        if arguments[0] not in ("nonsense", "--params") \
        else run_cli(*arguments)  # fmt: skip
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "a").exists() or not any(p.is_dir() for p in (tmp_path / "a").iterdir())


def test_a_stage_without_its_input_says_which_stage_to_run(tmp_path):
    done = run_cli("surgery", "--artifacts", str(tmp_path / "a"), "--reports", str(tmp_path / "r"))
    assert done.returncode == 4
    assert "run the export-onnx stage" in done.stderr


def test_requests_that_cannot_be_read_write_nothing():
    done = run_cli("recommend", "--input", "-", stdin='{"user_id": 1, "events": []}\n')
    assert done.returncode == 2
    assert "has no events" in done.stderr
    assert done.stdout == ""


def test_estimate_counts_the_reference_size_as_it_is():
    done = run_cli(
        "estimate", "--json", "--embedding-dim=1024", "--num-layers=12", "--num-heads=16", "--num-items=50000"
    )
    total = json.loads(done.stdout)["parameters"]["total"]
    assert 0.11e9 < total < 0.12e9
    text = run_cli("estimate").stdout
    assert re.search(r"^11\d,\d{3},\d{3} parameters \(0\.1\d+ billion\)", text)


def test_global_options_stand_before_or_after_the_command(tmp_path):
    before = run_cli("--artifacts", str(tmp_path / "x"), "-S", "surgery.check_seed=1", "surgery")
    after = run_cli("surgery", "--artifacts", str(tmp_path / "x"), "-S", "surgery.check_seed=1")
    assert before.returncode == after.returncode == 4
    assert before.stderr == after.stderr
    assert str(tmp_path / "x") in before.stderr


def test_both_readmes_name_the_same_commands():
    """What is indented is a command or a picture, the same in every language but for comments."""

    def commands(name: str) -> list[str]:
        lines = (ROOT / name).read_text().splitlines()
        return [line.partition("#")[0].rstrip() for line in lines if line.startswith("    ")]

    assert commands("README.zh-CN.md") == commands("README.md")
    rows = [(ROOT / name).read_text().count("\n| ") for name in ("README.md", "README.zh-CN.md")]
    assert rows[0] == rows[1]


def test_ctrl_c_says_what_it_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.configure.write_fitted_params", interrupted)
    monkeypatch.setattr("sys.argv", ["cli.py", "configure", "--output", str(tmp_path / "params.yaml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert "nothing half-written" in capsys.readouterr().err
