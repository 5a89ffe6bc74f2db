"""Whatever is done to a shipped bundle on its way is found, exit code 4, and nothing is written outside the root."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu.errors import ArtifactError
from stages.shipping.archive import pack_one
from stages.shipping.install import install
from stages.shipping.layout import SIGNATURE, Blob, documents, open_shipment
from stages.shipping.ship import ship
from stages.verify import verify
from tests.stages.bundles import checksummed
from tests.stages.shipping.shipments import (
    contents,
    members_of,
    read_whole,
    ship_archive,
    tar_of,
    write_bundle,
    write_keys,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture(scope="module")
def shipped(bundle: Path) -> Path:
    """A signed shipment; tests that harm it put back what they changed."""
    private, _ = write_keys(bundle.parent / "keys")
    ship(bundle, bundle.parent / "shipped", key=private)
    return bundle.parent / "shipped"


@pytest.fixture
def copy(shipped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped, tmp_path / "copy"))


def flips(shipped: Path, step: int, mask: int) -> Iterator[tuple[str, int]]:
    """Every `step`-th byte of every file, flipped in place by `mask` while the caller looks."""
    for path in sorted(path for path in shipped.rglob("*") if path.is_file()):
        data = path.read_bytes()
        with path.open("r+b", buffering=0) as stream:
            for offset in range(0, len(data), step if len(data) > 4096 else 1):
                os.pwrite(stream.fileno(), bytes([data[offset] ^ mask]), offset)
                yield path.name, offset
                os.pwrite(stream.fileno(), data[offset : offset + 1], offset)


def assert_every_flip_is_found(shipped: Path, step: int, mask: int) -> None:
    read_whole(shipped)
    found = 0
    for name, offset in flips(shipped, step, mask):
        try:
            read_whole(shipped)
        except ArtifactError:
            found += 1
        else:
            pytest.fail(f"byte {offset} of {name} was changed, and nobody noticed")
    assert found > 1000
    read_whole(shipped)


def test_a_changed_byte_is_found(copy: Path) -> None:
    """Every byte of the small files, every seventh of the layers."""
    assert_every_flip_is_found(copy, step=7, mask=0x01)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_any_changed_byte_is_found(copy: Path, mask: int) -> None:
    assert_every_flip_is_found(copy, step=1, mask=mask)


@pytest.mark.slow
def test_changed_bytes_of_a_real_bundle_are_found(tmp_path: Path) -> None:
    """Of the bundle that `make run` made: twenty bytes of every file, and 300 of wherever they fall."""
    made = Path(__file__).parents[3] / "artifacts" / "bundle"
    if not (made / "manifest.json").is_file():
        pytest.skip("no artifacts/bundle: run make run first")
    private, _ = write_keys(tmp_path / "keys")
    ship(made, tmp_path / "shipped", key=private)
    files = sorted(path for path in (tmp_path / "shipped").rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    rng = np.random.default_rng(0)
    places = [(index, int(rng.integers(size))) for index, size in enumerate(sizes) for _ in range(20)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for byte in rng.integers(starts[-1], size=300):
        index = int(np.searchsorted(starts, byte, side="right")) - 1
        places.append((index, int(byte - starts[index])))
    for index, offset in places:
        with files[index].open("r+b", buffering=0) as stream:
            (before,) = os.pread(stream.fileno(), 1, offset)
            os.pwrite(stream.fileno(), bytes([before ^ (1 << rng.integers(8))]), offset)
            with pytest.raises(ArtifactError) as refusal:
                read_whole(tmp_path / "shipped")
            os.pwrite(stream.fileno(), bytes([before]), offset)
        assert refusal.value.exit_code == 4, (files[index].name, offset)
    read_whole(tmp_path / "shipped")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_done_to_any_file_is_found(shipped: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A file cut, lengthened, emptied, removed, swapped with another, made a link or a folder, or one more added."""
    copy = Path(shutil.copytree(shipped, tmp_path / "harmed"))
    try:
        files = sorted(path for path in copy.rglob("*") if path.is_file())
        path = data.draw(st.sampled_from(files))
        harm = data.draw(
            st.sampled_from(["cut", "lengthen", "empty", "remove", "swap", "link", "folder", "add", "fifo"])
        )
        before = path.read_bytes()
        if harm == "cut":
            path.write_bytes(before[: data.draw(st.integers(0, len(before) - 1))])
        elif harm == "lengthen":
            path.write_bytes(before + data.draw(st.binary(min_size=1, max_size=1024)))
        elif harm == "empty":
            path.write_bytes(b"")
        elif harm == "swap":
            other = data.draw(st.sampled_from([each for each in files if each != path]))
            path.write_bytes(other.read_bytes())
            other.write_bytes(before)
        elif harm == "add":
            (path.parent / data.draw(st.sampled_from(["more", ".hidden", "0" * 64]))).write_bytes(b"more")
        else:
            path.unlink()
            if harm == "link":
                (tmp_path / "elsewhere").write_bytes(before)  # the right bytes, in the wrong place
                path.symlink_to(tmp_path / "elsewhere")
            elif harm == "folder":
                path.mkdir()
            elif harm == "fifo":
                os.mkfifo(path)
        with pytest.raises(ArtifactError) as refusal:
            read_whole(copy)
        assert refusal.value.exit_code == 4
    finally:
        shutil.rmtree(copy)


def reordered(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members[2], members[3] = members[3], members[2]


def one_more(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.append((tarfile.TarInfo("bundle/zzz"), b"more"))


def one_less(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    del members[-1]


def twice(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.insert(2, members[2])


def renamed(name: str) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[1] = (tarfile.TarInfo(name), members[1][1])

    return change


def retyped(kind: bytes, target: str = "") -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        info = tarfile.TarInfo(members[1][0].name)
        info.type, info.linkname = kind, target
        members[1] = (info, b"")

    return change


def other_header(**values: object) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        for key, value in values.items():
            setattr(members[1][0], key, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        reordered,
        one_more,
        one_less,
        twice,
        renamed("bundle/../../outside"),
        renamed("/tmp/hstu-outside"),
        renamed("bundle/./README.md"),
        renamed("README.md"),
        retyped(tarfile.SYMTYPE, "/etc/passwd"),
        retyped(tarfile.SYMTYPE, "manifest.json"),
        retyped(tarfile.LNKTYPE, "bundle/manifest.json"),
        retyped(tarfile.LNKTYPE, "../../outside"),
        retyped(tarfile.CHRTYPE),
        retyped(tarfile.BLKTYPE),
        retyped(tarfile.FIFOTYPE),
        retyped(tarfile.DIRTYPE),
        other_header(mode=0o4755),
        other_header(uid=1000),
        other_header(mtime=1),
        other_header(pax_headers={"path": "../outside"}),
        other_header(pax_headers={"linkpath": "/etc/passwd"}),
    ],
)
def test_hostile_archives_write_nothing_outside(change: Callable[..., None], bundle: Path, tmp_path: Path) -> None:
    """The layout around them is in order, so that only the reader of the archive stands in their way."""
    members = members_of(bundle)
    hostile = ship_archive(tmp_path / "hostile", tar_of(members))
    read_whole(hostile)  # until it is changed it is what `ship` writes
    shutil.rmtree(hostile)
    change(members)
    ship_archive(hostile, tar_of(members))
    outside = contents(tmp_path)
    with pytest.raises(ArtifactError) as refusal:
        install(hostile, tmp_path / "root")
    assert refusal.value.exit_code == 4
    left = {name: data for name, data in contents(tmp_path).items() if name != "root/.lock"}
    assert left == outside
    assert not Path("/tmp/hstu-outside").exists()


def manifest_with(bundle: Path, files: dict[str, dict[str, object]]) -> bytes:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    return checksummed({**manifest, "files": files})


@pytest.mark.parametrize("name", ["../outside", "/tmp/hstu-outside", "a/../../outside", "a//b", "", "a\\b", "a\0b"])
def test_a_manifest_that_names_paths_outside_is_refused(name: str, bundle: Path, tmp_path: Path) -> None:
    """Its checksum is right, as an attacker would make it."""
    entry = {"sha256": "0" * 64, "bytes": 0}
    members = [(tarfile.TarInfo("bundle/manifest.json"), manifest_with(bundle, {name: entry}))]
    hostile = ship_archive(tmp_path / "hostile", tar_of(members))
    with pytest.raises(ArtifactError, match="not the name of a file"):
        install(hostile, tmp_path / "root")


@pytest.mark.parametrize("names", [("a", "a/b"), ("n" * 300,)])
def test_names_that_no_folder_can_hold_are_refused(names: tuple[str, ...], bundle: Path, tmp_path: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    data = manifest_with(bundle, {name: {"sha256": empty, "bytes": 0} for name in names})
    members = [(tarfile.TarInfo("bundle/manifest.json"), data)]
    members += [(tarfile.TarInfo(f"bundle/{name}"), b"") for name in sorted(names)]
    hostile = ship_archive(tmp_path / "hostile", tar_of(members))
    with pytest.raises(ArtifactError, match="cannot be the name of a file"):
        install(hostile, tmp_path / "root")
    assert list((tmp_path / "root" / "versions").iterdir()) == []


def test_bombs_are_refused_before_anything_is_written(bundle: Path, tmp_path: Path) -> None:
    """A terabyte that is declared and not there, one that is a hole in a file, and more files than anybody has."""
    large = {"hole": {"sha256": "0" * 64, "bytes": 2**40}}
    members = [(tarfile.TarInfo("bundle/manifest.json"), manifest_with(bundle, large))]
    declared = ship_archive(tmp_path / "declared", tar_of(members))
    with pytest.raises(ArtifactError, match="another size than its manifest"):
        install(declared, tmp_path / "root")
    head = tarfile.TarInfo("bundle/hole")
    head.size = 2**40
    archive = tar_of(members)[:-1024] + head.tobuf(tarfile.PAX_FORMAT)
    hole = ship_archive(tmp_path / "hole", archive)
    (layer,) = [path for path in (hole / "blobs" / "sha256").iterdir() if path.read_bytes() == archive]
    size = len(archive) + 2**40 + 1024
    os.truncate(layer, size)
    for document in (hole / "blobs" / "sha256").iterdir():
        if document != layer:
            document.unlink()
    identity = hashlib.sha256(members[0][1]).hexdigest()
    for name, data in documents("0.1.0", identity, [Blob(sha256=layer.name, size=size)]).items():
        (hole / name).write_bytes(data)
    assert open_shipment(hole).layer.size == size
    with pytest.raises(ArtifactError, match="too large"):
        install(hole, tmp_path / "root")
    assert list((tmp_path / "root" / "versions").iterdir()) == []


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"null", b"{", b'{"manifests": []}', b'{"manifests": [{"digest": "sha256:../../etc/passwd"}]}',
     b'{"manifests": [{"digest": 7}]}', b"[" * 100_000, b'"' + b"x" * (2 << 20) + b'"'],
)  # fmt: skip
def test_an_index_of_somebody_else_is_refused(document: bytes, copy: Path) -> None:
    (copy / "index.json").write_bytes(document)
    with pytest.raises(ArtifactError):
        read_whole(copy)


def test_an_older_manifest_in_a_newer_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    newer = write_bundle(tmp_path / "newer", "0.2.0")
    members = members_of(newer)
    members[0] = members_of(bundle)[0]
    with pytest.raises(ArtifactError):
        read_whole(ship_archive(tmp_path / "mixed", tar_of(members)))


def test_the_signature_of_an_older_bundle_does_not_hold_for_a_newer(bundle: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    ship(bundle, tmp_path / "old", key=private)
    ship(write_bundle(tmp_path / "newer", "0.2.0"), tmp_path / "new", key=private)
    old, new = open_shipment(tmp_path / "old"), open_shipment(tmp_path / "new")
    assert old.signature is not None
    archive = pack_one(SIGNATURE, old.signature)
    layers = [new.layer, Blob(sha256=hashlib.sha256(archive).hexdigest(), size=len(archive))]
    mixed = tmp_path / "mixed"
    for name, data in {**documents(new.version, new.id, layers), layers[1].path: archive}.items():
        (mixed / name).parent.mkdir(parents=True, exist_ok=True)
        (mixed / name).write_bytes(data)
    shutil.copyfile(new.archive, mixed / new.layer.path)
    read_whole(mixed)  # all of it belongs together, but the signature
    for check in (lambda: verify(mixed, key=public), lambda: install(mixed, tmp_path / "root", key=public)):
        with pytest.raises(ArtifactError, match="the signature is of other files") as refusal:
            check()
        assert refusal.value.exit_code == 4
