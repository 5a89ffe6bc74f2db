"""Shipping: the same bytes every time, in a form that public tools read and check, and whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from hstu.artifact import write_manifest
from hstu.errors import ArtifactError, InputError, UsageError
from stages.shipping import ship as shipping
from stages.shipping.layout import open_shipment
from stages.shipping.ship import render, ship
from stages.verify import verify
from tests.stages.shipping.shipments import contents, write_bundle, write_keys

ROOT = Path(__file__).parents[3]
SKOPEO = shutil.which("skopeo")
needs_skopeo = pytest.mark.skipif(SKOPEO is None, reason="skopeo is not installed (apt-get install skopeo)")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_the_same_bundle_and_key_are_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    """Whatever times, modes and order the files have, and wherever they lie."""
    private, _ = write_keys(tmp_path / "keys")
    ship(bundle, tmp_path / "one", key=private)
    other = tmp_path / "other place"
    for path in sorted(bundle.rglob("*"), reverse=True):
        if path.is_file():
            target = other / path.relative_to(bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            target.chmod(0o700)
            os.utime(target, (1, 1))
    ship(other, tmp_path / "two", key=private)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    ship(bundle, tmp_path / "unsigned")
    unsigned, signed = open_shipment(tmp_path / "unsigned"), open_shipment(tmp_path / "one")
    assert unsigned.layer == signed.layer
    assert (unsigned.signature is None, signed.signature is None) == (True, False)


def test_what_is_told(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ship(bundle, tmp_path / "shipped")
    assert json.loads(json.dumps(result)) == result
    assert (result["version"], result["signed"]) == ("0.1.0", False)
    assert "not signed" in render(result)
    assert "MB/s" in capsys.readouterr().err


def test_the_layer_is_a_tar_that_anybody_reads(bundle: Path, tmp_path: Path) -> None:
    ship(bundle, tmp_path / "shipped")
    with tarfile.open(open_shipment(tmp_path / "shipped").archive) as archive:
        archive.extractall(tmp_path / "out", filter="data")
        assert {(m.mode, m.uid, m.mtime, m.uname, m.isreg()) for m in archive} == {(0o644, 0, 0, "", True)}
    assert contents(tmp_path / "out" / "bundle") == contents(bundle)


@needs_skopeo
def test_skopeo_reads_it_and_a_copy_it_makes_is_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    ship(bundle, tmp_path / "shipped", key=private)
    done = subprocess.run(
        ["skopeo", "inspect", f"oci:{tmp_path}/shipped"], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout)["Labels"]["hstu.bundle.version"] == "0.1.0"
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--insecure-policy", "--preserve-digests",
         f"oci:{tmp_path}/shipped:0.1.0", f"oci:{tmp_path}/copy:0.1.0"],
        check=True, timeout=60, capture_output=True,
    )  # fmt: skip
    assert contents(tmp_path / "copy") == contents(tmp_path / "shipped")
    assert verify(tmp_path / "copy", key=public)["signed_with"]


@needs_skopeo
def test_a_copy_that_was_compressed_says_how_to_copy(bundle: Path, tmp_path: Path) -> None:
    ship(bundle, tmp_path / "shipped")
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--insecure-policy", f"oci:{tmp_path}/shipped", f"oci:{tmp_path}/copy:0.1.0"],
        check=True, timeout=60, capture_output=True,
    )  # fmt: skip
    with pytest.raises(ArtifactError, match="--preserve-digests"):
        verify(tmp_path / "copy")


def run_model_signing(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_model_signing_checks_our_signatures_and_we_check_its(bundle: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    ship(bundle, tmp_path / "shipped", key=private)
    shipment = open_shipment(tmp_path / "shipped")
    assert shipment.signature is not None
    ours, theirs = tmp_path / "ours.sig", tmp_path / "theirs.sig"
    ours.write_bytes(shipment.signature)
    checked = run_model_signing("verify", "key", bundle, "--signature", ours, "--public_key", public)
    assert (checked.returncode, "Verification succeeded" in checked.stdout) == (0, True), checked.stdout
    signed = run_model_signing("sign", "key", bundle, "--private_key", private, "--signature", theirs)
    assert signed.returncode == 0, signed.stderr
    assert verify(bundle, key=public, signature=theirs)["signed_with"]
    (bundle / "README.md").write_text("other\n")
    checked = run_model_signing("verify", "key", bundle, "--signature", ours, "--public_key", public)
    assert checked.returncode != 0


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_signatures_hold_for_their_key_alone(curve: ec.EllipticCurve, bundle: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys", curve)
    _, stranger = write_keys(tmp_path / "stranger", curve)
    ship(bundle, tmp_path / "shipped", key=private)
    assert verify(tmp_path / "shipped", key=public)["signed_with"]
    with pytest.raises(ArtifactError, match="not signed with this key"):
        verify(tmp_path / "shipped", key=stranger)


def test_what_is_no_key_is_said_to_be_none(bundle: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    _, other = write_keys(tmp_path / "other", ec.SECP256K1())
    for key in (public, tmp_path / "nowhere.pem"):
        with pytest.raises(InputError, match=r"key|cannot be read"):
            ship(bundle, tmp_path / "shipped", key=key)
    ship(bundle, tmp_path / "shipped", key=private)
    for key in (private, other, tmp_path / "nowhere.pem"):
        with pytest.raises(InputError, match=r"key|cannot be read"):
            verify(tmp_path / "shipped", key=key)


def test_without_a_signature_a_key_is_refused(bundle: Path, tmp_path: Path) -> None:
    _, public = write_keys(tmp_path / "keys")
    ship(bundle, tmp_path / "shipped")
    with pytest.raises(ArtifactError, match="not signed"):
        verify(tmp_path / "shipped", key=public)
    with pytest.raises(ArtifactError, match="signature cannot be read"):
        verify(bundle, key=public)


def changed_byte(bundle: Path) -> None:
    data = bytearray((bundle / "model.safetensors").read_bytes())
    data[100] ^= 1
    (bundle / "model.safetensors").write_bytes(data)


def longer(bundle: Path) -> None:
    with (bundle / "model.safetensors").open("ab") as stream:
        stream.write(b"more")


def shorter(bundle: Path) -> None:
    os.truncate(bundle / "model.safetensors", 10)


def extra(bundle: Path) -> None:
    (bundle / ".gitignore").write_text("what model-signing would not see\n")


def linked(bundle: Path) -> None:
    (bundle / "README.md").unlink()
    (bundle / "README.md").symlink_to("/etc/hostname")


def no_version(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    write_manifest(bundle, stage="bundle", params={"version": "1.0"}, inputs={}, toolchain={})


@pytest.mark.parametrize("harm", [changed_byte, longer, shorter, extra, linked, no_version])
def test_a_bundle_that_is_not_whole_is_not_shipped(harm: Callable[[Path], None], bundle: Path, tmp_path: Path) -> None:
    harm(bundle)
    with pytest.raises(ArtifactError) as refusal:
        ship(bundle, tmp_path / "shipped")
    assert refusal.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_stands_at_the_output_stays(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "shipped").mkdir()
    ship(bundle, tmp_path / "shipped")
    before = contents(tmp_path / "shipped")
    with pytest.raises(UsageError, match="a shipped bundle stands here already"):
        ship(bundle, tmp_path / "shipped")
    assert contents(tmp_path / "shipped") == before
    with pytest.raises(UsageError, match="something stands here"):
        ship(bundle, bundle)
    with pytest.raises(UsageError, match="cannot be written to"):
        ship(bundle, bundle / "README.md" / "below a file")


def test_an_interrupted_run_leaves_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def interrupted(what: str, *, total: int) -> Iterator[Callable[[int], None]]:
        def advance_to(done: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        yield advance_to

    monkeypatch.setattr(shipping, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ship(bundle, tmp_path / "shipped")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def large(bundle: Path, size: int) -> Path:
    """The bundle with one file more, a hole of `size` bytes."""
    with (bundle / "hole").open("wb") as stream:
        stream.truncate(size)
    (bundle / "manifest.json").unlink()
    write_manifest(bundle, stage="bundle", params={"version": "0.1.0"}, inputs={}, toolchain={})
    return bundle


def cli(*arguments: str | Path, before: str = "") -> subprocess.Popen[str]:
    code = f"import signal, sys; {before}\nimport cli; sys.argv = ['cli.py', *sys.argv[1:]]; cli.main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_command_leaves_nothing(signum: signal.Signals, bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    process = cli("ship", "--bundle", large(bundle, 400 << 20), "--output", place / "shipped")
    while process.poll() is None and not list(place.glob(".shipped.tmp-*/blobs/sha256/layer")):
        time.sleep(0.005)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert list(place.iterdir()) == []


def test_a_full_disk_is_one_message_and_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the system says so in the same way."""
    place = tmp_path / "place"
    place.mkdir()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    process = cli("ship", "--bundle", large(bundle, 8 << 20), "--output", place / "shipped", before=limit)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, "the disk is full" in errors) == (2, True), errors
    assert list(place.iterdir()) == []
