"""Every example runs to its end, from the repository's root, as its first lines say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta_research import SMALL, write_meta_checkpoint

ROOT = Path(__file__).parent.parent
QUICK = ["-S", "bundle.engines=[fp32-onnxruntime]", "-S", "bundle.default_engine=fp32-onnxruntime"]
TRAIN = ["-S", "checkpoint.reference_epochs=2", "-S", "checkpoint.evaluation_histories=60"]
pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def answers(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"user_id"')]


def test_a_checkpoint_of_metas(tmp_path: Path) -> None:
    file = write_meta_checkpoint(tmp_path / "meta.pt", SMALL)
    text = run("examples/meta_checkpoint.sh", file, "2", tmp_path / "out", *QUICK)
    (answer,) = answers(text)
    assert len(answer["items"]) == 5  # type: ignore[arg-type]
    assert "signed with the key" in text


def test_an_event_log(tmp_path: Path) -> None:
    text = run("examples/event_log.sh", tmp_path / "out", *QUICK, *TRAIN)
    assert len(answers(text)) == 3


def test_a_surgery_pass(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    file = write_meta_checkpoint(tmp_path / "meta.pt", SMALL)
    settings = ["-S", "checkpoint.source=meta", "-S", f"checkpoint.path={file}", "-S", "checkpoint.num_heads=2"]
    run(sys.executable, "cli.py", "compile", "--until", "surgery", "--artifacts", artifacts,
        "--reports", tmp_path / "reports", *settings)  # fmt: skip
    text = run(sys.executable, "examples/surgery_pass.py", artifacts / "surgery")
    assert "retrieve:" in text
    assert "max abs error 0\n" in text
