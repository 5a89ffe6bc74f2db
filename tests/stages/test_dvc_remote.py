"""Artifacts pushed to a DVC remote and pulled elsewhere are the same, byte for byte."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hstu.artifact import open_artifact
from hstu.errors import ArtifactError
from tests.stages.shipping.shipments import contents, write_bundle

PIPELINE = """\
stages:
  bundle:
    cmd: "true"
    outs:
      - artifacts/bundle: {persist: true}
"""


def dvc(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=cwd, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(1500)
def test_push_and_pull_through_a_local_remote(tmp_path: Path) -> None:
    """As docs/DEPLOYMENT.md says, with a folder as the remote and a second checkout of the same lock."""
    here, there, store = tmp_path / "here", tmp_path / "there", tmp_path / "store"
    here.mkdir()
    dvc("init", "--no-scm", cwd=here)
    (here / "dvc.yaml").write_text(PIPELINE)
    write_bundle(here / "artifacts" / "bundle")
    dvc("commit", "--force", cwd=here)
    dvc("remote", "add", "--default", "store", str(store), cwd=here)
    dvc("push", cwd=here)
    shutil.copytree(here, there, ignore=shutil.ignore_patterns("artifacts", "cache", "tmp"))
    dvc("pull", cwd=there)
    assert contents(there / "artifacts" / "bundle") == contents(here / "artifacts" / "bundle")
    made = open_artifact(here / "artifacts" / "bundle", stage="bundle")
    assert open_artifact(there / "artifacts" / "bundle", stage="bundle").id == made.id
    (there / "artifacts" / "bundle" / "README.md").chmod(0o644)
    (there / "artifacts" / "bundle" / "README.md").write_text("other\n")
    with pytest.raises(ArtifactError):
        open_artifact(there / "artifacts" / "bundle")
