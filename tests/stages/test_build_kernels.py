"""Stage build-kernels: what it writes, that it writes it again byte for byte, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hstu.errors import MissingBackendError, ParameterError
from stages.build_kernels import STAGE
from stages.contract import Workspace, execute

SECTION = {
    "sms": [80, 90], "ops": ["embedding_bag", "interaction"], "dtypes": ["bf16"], "head_dims": [64],
    "every_config": False,
}  # fmt: skip


def workspace(folder: Path, **changes: object) -> Workspace:
    return Workspace(
        artifacts=folder / "artifacts", reports=folder / "reports", values={"build-kernels": SECTION | changes}
    )


def test_an_artifact_holds_every_kernel_for_every_sm_and_comes_out_the_same_again(tmp_path: Path) -> None:
    first = execute(STAGE, workspace(tmp_path / "first"))
    again = execute(STAGE, workspace(tmp_path / "again"))
    assert first.id == again.id
    for sm in (80, 90):
        names = {path.name for path in (first.path / f"sm_{sm}").iterdir()}
        stems = {"embedding_bag-bf16-d128", "interaction-bf16-f27-d128", "interaction-bf16-f27-d128-self"}
        assert names == {f"{stem}.{suffix}" for stem in stems for suffix in ("cubin", "ptx", "json")}
    description = json.loads((first.path / "sm_90" / "embedding_bag-bf16-d128.json").read_text())
    assert description["tools"]["triton"] == first.manifest["toolchain"]["triton"]
    assert len(description["source_sha256"]) == 64


def test_every_config_is_there_for_the_bench(tmp_path: Path) -> None:
    built = execute(STAGE, workspace(tmp_path, sms=[90], ops=["embedding_bag"], every_config=True))
    cubins = sorted(path.stem for path in (built.path / "sm_90").glob("*.cubin"))
    assert len(cubins) == 3
    assert sum("@" in name for name in cubins) == 2


@pytest.mark.parametrize(
    "changes", [{"sms": [70]}, {"sms": []}, {"dtypes": ["bf16", "bf16"]}, {"head_dims": [512]}, {"ops": ["softmax"]}]
)
def test_bad_parameters_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match="build-kernels"):
        execute(STAGE, workspace(tmp_path, **changes))


def test_an_interpreting_triton_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(MissingBackendError, match="unset TRITON_INTERPRET"):
        execute(STAGE, workspace(tmp_path))
