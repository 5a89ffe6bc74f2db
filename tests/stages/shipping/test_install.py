"""Installing: checked before anything serves, switched whole, never backwards unless somebody says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hstu.artifact import open_artifact
from hstu.errors import ArtifactError, MissingBackendError, UsageError
from stages.bundle_list import list_bundles
from stages.shipping import install as installing
from stages.shipping.install import install, render, rollback
from stages.shipping.root import read_root
from stages.shipping.ship import ship
from stages.verify import verify
from tests.stages.shipping.shipments import contents, write_bundle, write_keys

Ship = Callable[..., Path]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path / "keys")


@pytest.fixture
def shipped(tmp_path: Path) -> Ship:
    """Makes shipments: shipped("0.2.0", text=…, backend=…, key=…)."""

    def make(version: str, *, key: Path | None = None, backend: str = "onnxruntime", text: bytes = b"") -> Path:
        name = f"{version}-{text.decode()}-{backend}-{key is not None}"
        if not (tmp_path / "shipped" / name).exists():
            bundle = write_bundle(tmp_path / "bundles" / name, version, backend=backend, text=text)
            ship(bundle, tmp_path / "shipped" / name, key=key)
        return tmp_path / "shipped" / name

    return make


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def serving(root: Path) -> str:
    return str(open_artifact(root / "current", stage="bundle").params["version"])


def test_install_upgrade_and_rollback(shipped: Ship, root: Path, tmp_path: Path) -> None:
    first = install(shipped("0.1.0"), root)
    assert (serving(root), first["before"]) == ("0.1.0", None)
    assert contents(root / "current") == contents(tmp_path / "bundles" / "0.1.0--onnxruntime-False")
    second = install(shipped("0.2.0"), root)
    assert (serving(root), second["before"]) == ("0.2.0", first["name"])
    install(shipped("0.10.0"), root)  # numbers, not text
    assert serving(root) == "0.10.0"
    assert rollback(root)["name"] == second["name"]
    assert serving(root) == "0.2.0"
    assert rollback(root)["name"] == first["name"]
    with pytest.raises(UsageError, match="nothing served before"):
        rollback(root)
    assert serving(root) == "0.1.0"
    assert "current → " in render(first).replace(str(root) + "/", "")
    states = {row["version"]: row["state"] for row in list_bundles(root)}
    assert states == {"0.1.0": "serves", "0.2.0": "", "0.10.0": ""}


def test_the_same_again_changes_nothing(shipped: Ship, root: Path) -> None:
    install(shipment := shipped("0.1.0"), root)
    before = contents(root)
    install(shipment, root)
    assert contents(root) == before


def test_an_older_one_is_refused(shipped: Ship, root: Path, keys: tuple[Path, Path]) -> None:
    """However well it is signed, and after a rollback as well."""
    private, public = keys
    old = shipped("0.1.0", key=private)
    install(old, root, key=public)
    install(shipped("0.2.0", key=private), root, key=public)
    before = contents(root)
    with pytest.raises(ArtifactError, match="older than what was installed here") as refusal:
        install(old, root, key=public)
    assert refusal.value.exit_code == 4
    assert contents(root) == before
    install(shipped("0.3.0", key=private), root, key=public)
    rollback(root, key=public)
    assert serving(root) == "0.2.0"
    for again in (old, shipped("0.2.5", key=private)):
        with pytest.raises(ArtifactError, match="older than what was installed here"):
            install(again, root, key=public)
    install(shipped("0.3.1", key=private), root, key=public)
    assert serving(root) == "0.3.1"


def test_the_newest_may_come_back_after_a_rollback(shipped: Ship, root: Path) -> None:
    install(shipped("0.1.0"), root)
    install(newest := shipped("0.2.0"), root)
    rollback(root)
    install(newest, root)
    assert serving(root) == "0.2.0"
    rollback(root)
    assert serving(root) == "0.1.0"


def test_another_bundle_of_the_same_version_is_refused(shipped: Ship, root: Path) -> None:
    install(shipped("0.1.0"), root)
    with pytest.raises(ArtifactError, match="another bundle has this version"):
        install(shipped("0.1.0", text=b"other"), root)
    install(shipped("0.1.0", text=b"others"), root, allow_downgrade=True)
    assert (root / "current" / "extra.txt").read_bytes() == b"others"


def test_a_downgrade_that_is_asked_for_is_the_newest_from_then_on(shipped: Ship, root: Path) -> None:
    install(shipped("0.3.0"), root)
    install(shipped("0.1.0"), root, allow_downgrade=True)
    assert (serving(root), read_root(root).newest_version) == ("0.1.0", "0.1.0")
    install(shipped("0.2.0"), root)


def test_who_made_it(shipped: Ship, root: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    _, stranger = write_keys(tmp_path / "stranger")
    unsigned, signed = shipped("0.1.0"), shipped("0.1.0", key=private)
    with pytest.raises(ArtifactError, match="not signed"):
        install(unsigned, root, key=public)
    with pytest.raises(ArtifactError, match="not signed with this key"):
        install(signed, root, key=stranger)
    assert not (root / "current").exists()
    install(signed, root, key=public)
    assert verify(root / "current", key=public)["signed_with"] == read_root(root).key
    with pytest.raises(UsageError, match="none is given now"):  # what was checked once is checked always
        install(shipped("0.2.0", key=private), root)
    signature = next((root / "versions").glob("*.sig"))
    signature.write_bytes(signature.read_bytes().replace(b'"sig": "M', b'"sig": "N'))
    with pytest.raises(ArtifactError, match="not signed with this key"):
        verify(root / "current", key=public)


def test_a_signature_that_comes_later_is_kept(shipped: Ship, root: Path, keys: tuple[Path, Path]) -> None:
    """The same bundle, installed unsigned at first."""
    private, public = keys
    install(shipped("0.1.0"), root)
    with pytest.raises(ArtifactError, match="signature cannot be read"):
        verify(root / "current", key=public)
    install(shipped("0.1.0", key=private), root, key=public)
    assert verify(root / "current", key=public)["signed_with"]


def test_an_engine_that_cannot_run_here_does_not_serve_here(shipped: Ship, root: Path) -> None:
    install(shipped("0.1.0"), root)
    with pytest.raises(MissingBackendError, match="default engine 'fp32' cannot run here"):
        install(shipped("0.2.0", backend="tensorrt"), root)
    assert serving(root) == "0.1.0"
    assert len(list((root / "versions").iterdir())) == 1
    install(shipped("0.2.0", backend="tensorrt"), root, elsewhere=True)
    assert serving(root) == "0.2.0"


def test_sizes_have_a_limit(shipped: Ship, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="too large"):
        install(shipped("0.1.0"), root, max_gib=1e-6)
    monkeypatch.setattr(installing, "free_disk_bytes", lambda path: 100)
    with pytest.raises(UsageError, match="too little room"):
        install(shipped("0.1.0"), root)
    assert not (root / "current").exists()


def test_a_damaged_version_is_installed_again(shipped: Ship, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(shipment := shipped("0.1.0"), root)
    before = contents(root)
    (root / "current" / "README.md").write_text("other\n")
    install(shipment, root)
    assert contents(root) == before
    assert "installing again" in capsys.readouterr().err


def test_a_damaged_version_is_not_rolled_back_to(shipped: Ship, root: Path) -> None:
    first = install(shipped("0.1.0"), root)
    install(shipped("0.2.0"), root)
    (Path(first["path"]) / "README.md").write_text("other\n")
    with pytest.raises(ArtifactError, match=r"README\.md"):
        rollback(root)
    assert serving(root) == "0.2.0"


@pytest.mark.parametrize("step", ["open_shipment", "unpack", "check_lineage", "sync", "write_root", "switch"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_whatever_stops_it_what_served_serves(
    step: str, failure: BaseException, shipped: Ship, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise failure

    install(shipped("0.1.0"), root)
    newer = shipped("0.2.0")
    with monkeypatch.context() as patch:
        patch.setattr(installing, step, stop)
        with pytest.raises((KeyboardInterrupt, UsageError)):
            install(newer, root)
    assert serving(root) == "0.1.0"
    assert not list((root / "versions").glob(".*"))
    install(newer, root)  # and the next run ends well
    assert serving(root) == "0.2.0"
    rollback(root)
    assert serving(root) == "0.1.0"


@pytest.mark.parametrize(
    "state", [b"", b"{}", b"[]", b'{"schema": 2, "history": []}', b'{"schema": 1, "history": ["../.."]}',
              b'{"schema": 1, "history": [], "newest_version": "new"}', None],
)  # fmt: skip
def test_a_root_that_lost_its_memory_takes_nothing(state: bytes | None, shipped: Ship, root: Path) -> None:
    install(shipped("0.1.0"), root)
    if state is None:
        (root / "installed.json").unlink()
    else:
        (root / "installed.json").write_bytes(state)
    with pytest.raises(ArtifactError, match=r"installed\.json"):
        install(shipped("0.2.0"), root)
    with pytest.raises(ArtifactError, match=r"installed\.json"):
        rollback(root)
    assert serving(root) == "0.1.0"


def test_what_is_not_ours_stays(shipped: Ship, root: Path, tmp_path: Path) -> None:
    root.mkdir()
    (root / "current").mkdir()
    with pytest.raises(UsageError, match="not a link of ours"):
        install(shipped("0.1.0"), root)
    (root / "current").rmdir()
    (root / "current").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="not a link of ours"):
        install(shipped("0.1.0"), root)
    with pytest.raises(UsageError, match="nothing is installed here"):
        rollback(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no shipped bundle here"):
        install(tmp_path, tmp_path / "fresh")


def test_the_state_is_json_without_paths(shipped: Ship, root: Path) -> None:
    install(shipped("0.1.0"), root)
    text = (root / "installed.json").read_text()
    assert json.loads(text)["newest_version"] == "0.1.0"
    assert str(root) not in text
    assert os.readlink(root / "current") == f"versions/{json.loads(text)['history'][0]}"  # noqa: PTH115
