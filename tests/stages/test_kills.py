"""Every real stage, run by the command line and killed at random moments: a whole artifact or none is left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from hstu.artifact import open_artifact
from tests.models import random_model, tiny_config, write_checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
CONFIG = tiny_config(num_layers=1)
SMALL = [
    "prepare-data.reference_users=400",
    "prepare-data.reference_items=150",
    "checkpoint.source=huggingface",
    "bundle.engines=[fp32]",
    "benchmark.cases=[trained]",
]
FOLDERS = {
    "prepare-data": "prepare-data",
    "checkpoint": "checkpoint",
    "export-onnx": "export-onnx",
    "surgery": "surgery",
    "build-engine": "build-engine/fp32",
    "bundle": "bundle",
}


@dataclass(frozen=True, kw_only=True)
class Built:
    """A workspace in which every stage up to the bundle has run, how long each took, and the ids of what it made."""

    folder: Path
    seconds: dict[str, float]
    ids: dict[str, str]

    def start(self, stage: str, *more: str) -> subprocess.Popen[bytes]:
        settings = [*SMALL, f"checkpoint.path={self.folder / 'weights'}", *more]
        command = [
            sys.executable,
            "cli.py",
            stage,
            "--artifacts",
            str(self.artifacts),
            "--reports",
            str(self.folder / "r"),
        ]
        for setting in settings:
            command += ["-S", setting]
        return subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def finish(self, stage: str) -> None:
        process = self.start(stage)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-3000:]

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("pipeline")
    write_checkpoint(folder / "weights", random_model(CONFIG))
    (folder / "weights" / "manifest.json").unlink()
    built = Built(folder=folder, seconds={}, ids={})
    for stage, name in FOLDERS.items():
        started = time.monotonic()
        built.finish(stage)
        built.seconds[stage] = time.monotonic() - started
        built.ids[stage] = open_artifact(built.artifacts / name, stage=stage).id
    return built


def leftovers(artifacts: Path) -> list[str]:
    return [str(p) for p in artifacts.rglob(".*") if p.name != ".lock"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", FOLDERS)
def test_a_killed_stage_leaves_a_whole_artifact_or_none(built: Built, stage: str) -> None:
    """With the earlier artifact in place and without it; what a later run makes is the same, byte for byte."""
    draw = random.Random(stage)
    path = built.artifacts / FOLDERS[stage]
    for index, signum in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)):
        if index == 2:
            shutil.rmtree(path)
        process = built.start(stage)
        time.sleep(built.seconds[stage] * draw.uniform(0.2, 1.0))
        os.killpg(process.pid, signum)
        process.communicate(timeout=60)
        if path.exists() or index < 2:
            assert open_artifact(path, stage=stage).id == built.ids[stage]
        if signum != signal.SIGKILL and process.returncode != 0:
            assert process.returncode in (130, -signum)
    built.finish(stage)
    assert open_artifact(path, stage=stage).id == built.ids[stage]
    assert leftovers(built.artifacts) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "settings", "seconds"),
    [("checkpoint", ("checkpoint.source=reference", "checkpoint.path=null"), 20.0), ("benchmark", (), 25.0)],
)
def test_long_work_that_is_killed_keeps_nothing(
    built: Built, stage: str, settings: tuple[str, ...], seconds: float
) -> None:
    """Training and measuring take minutes: killed in the middle, with their children."""
    before = {name: open_artifact(built.artifacts / FOLDERS[name]).id for name in FOLDERS}
    for signum in (signal.SIGKILL, signal.SIGTERM):
        process = built.start(stage, *settings)
        time.sleep(seconds)
        assert process.poll() is None
        os.killpg(process.pid, signum)
        process.communicate(timeout=60)
        assert process.returncode in (-signum, 130)
        assert {name: open_artifact(built.artifacts / FOLDERS[name]).id for name in FOLDERS} == before
        assert stage in FOLDERS or not (built.artifacts / stage).exists()


def test_two_runs_at_once_in_one_workspace(built: Built) -> None:
    """The second says so in one message and exits with 2; the first goes on to its end."""
    first = built.start("export-onnx")
    lock = built.artifacts / ".lock"
    while not lock.is_file() or lock.read_text().strip() != str(first.pid):
        assert first.poll() is None
        time.sleep(0.05)
    second = built.start("surgery")
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2
    assert "another run is at work here" in errors.decode()
    assert first.wait(timeout=300) == 0
    first.communicate()
