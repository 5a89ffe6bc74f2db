"""Install: a shipped bundle is checked, unpacked and switched to; at any moment one whole bundle serves."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from hstu.artifact import Artifact, open_artifact
from hstu.errors import ArtifactError, UsageError
from stages.bundle_lineage import check_lineage
from stages.compiling import progress
from stages.environment_fit import environment_fit, require_fit
from stages.machine import free_disk_bytes
from stages.shipping.archive import unpack
from stages.shipping.layout import Shipment, open_shipment
from stages.shipping.root import (
    CURRENT,
    VERSIONS,
    Root,
    check_monotone,
    current,
    folder_name,
    read_root,
    settled,
    switch,
    write_root,
)
from stages.shipping.signature import check_signature, digests_of
from stages.workspace import FullDisk, hold, interruptible, new_folder, say, sync, sync_folder, uninterrupted

MAX_FILES = 100_000
MAX_GIB = 64.0
ANOTHER_ROOT = "pass another --root DIR"


def install(
    shipped: Path,
    root: Path,
    *,
    key: Path | None = None,
    allow_downgrade: bool = False,
    elsewhere: bool = False,
    max_gib: float = MAX_GIB,
) -> dict[str, Any]:
    """What serves now: the bundle shipped at `shipped` stands below `root`, and `root`/current leads to it.

    Raises ArtifactError when a byte is wrong, the signature is not of `key`, the version is not above those accepted
    before (unless `allow_downgrade`) or it is too large; MissingBackendError when its default engine cannot run here
    (unless `elsewhere`); UsageError when the disk is full. Until the last step nothing that serves has changed.
    """
    with interruptible(), hold(root, fix=ANOTHER_ROOT), FullDisk("install", root, fix=ANOTHER_ROOT):
        before = current(root)
        state = settled(read_root(root), before)
        shipment = open_shipment(shipped)
        fingerprint = _check_maker(shipment, state, key)
        if not allow_downgrade:
            check_monotone(state, shipment.version, shipment.id, source=str(shipped))
        name = folder_name(shipment.version, shipment.id)
        place = root / VERSIONS / name
        place.parent.mkdir(exist_ok=True)
        if not _stands(place, shipment):
            _unpack(shipment, place, elsewhere=elsewhere, max_gib=max_gib)
        if shipment.signature is not None:
            _write_signature(signature_of(place), shipment.signature)
        state = replace(state, newest_version=shipment.version, newest_id=shipment.id, key=fingerprint)
        if before != name:
            state = replace(state, history=(*state.history, name))
        with uninterrupted():
            write_root(root, state)  # first: from here on nothing older is taken, even if the switch never happens
            switch(root, name)
    return _told(root, place, signed=fingerprint is not None, before=before)


def rollback(root: Path, *, key: Path | None = None) -> dict[str, Any]:
    """What serves now: the version that served before, checked again; what may be installed next does not change.

    Raises UsageError when nothing served before, ArtifactError when it is not whole any more or, with `key`, not
    signed with it.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: nothing is installed here", fix="install a shipped bundle first")
    with interruptible(), hold(root, fix=ANOTHER_ROOT):
        before = current(root)
        state = settled(read_root(root), before)
        if len(state.history) < 2:
            raise UsageError(f"{root}: nothing served before {before or 'now'}", fix="install another version")
        name = state.history[-2]
        place = root / VERSIONS / name
        artifact = open_artifact(place, stage="bundle")
        if key is not None:
            check_installed_signature(artifact, key)
        with uninterrupted():
            switch(root, name)
            write_root(root, replace(state, history=state.history[:-1]))
    return _told(root, place, signed=key is not None, before=before)


def render(result: dict[str, Any]) -> str:
    """The same for a person."""
    return f"{result['current']} → {result['path']}" + (f"  (before: {result['before']})" if result["before"] else "")


def signature_of(bundle: Path) -> Path:
    """Where the signature of an installed bundle lies: beside its folder."""
    place = bundle.resolve()
    return place.with_name(f"{place.name}.sig")


def check_installed_signature(bundle: Artifact, key: Path, *, signature: Path | None = None) -> str:
    """The fingerprint of `key`, with which the bundle was signed; ArtifactError when it was not."""
    path = signature_of(bundle.path) if signature is None else signature
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{path}: the bundle's signature cannot be read ({error.strerror})",
            fix="pass --signature FILE, or verify without --key",
        ) from None
    return check_signature(data, digests_of(bundle.manifest, bundle.id), key, source=str(path))


def check_shipped_signature(shipment: Shipment, key: Path) -> str:
    """The fingerprint of `key`, with which the shipped bundle was signed; ArtifactError when it was not."""
    if shipment.signature is None:
        raise ArtifactError(
            f"{shipment.path}: not signed", expected=f"a signature of the key {key}", fix="ship it with --sign KEY"
        )
    digests = digests_of(shipment.manifest, shipment.id)
    return check_signature(shipment.signature, digests, key, source=str(shipment.path))


def unpack_shipment(shipment: Shipment, target: Path, *, max_gib: float = MAX_GIB) -> Artifact:
    """The bundle stands in the empty folder `target`, every byte verified; nothing is written when it is too large."""
    _check_size(shipment, target, max_gib)
    with progress("unpacking", total=shipment.layer.size) as advance_to:
        unpack(shipment.archive, target, sha256=shipment.layer.sha256, advance_to=advance_to)
    artifact = open_artifact(target, stage="bundle", verify=False)  # each byte was checked on its way here
    if artifact.id != shipment.id:
        raise ArtifactError(f"{shipment.path}: it changed while it was read", got=artifact.id, expected=shipment.id)
    return artifact


def _check_maker(shipment: Shipment, state: Root, key: Path | None) -> str | None:
    if key is not None:
        return check_shipped_signature(shipment, key)
    if state.key is not None:
        raise UsageError(
            "bundles in this root were checked with a key, and none is given now",
            expected=f"--key PUB, such as the one with fingerprint {state.key[:12]}",
            fix="pass it, or install into another root",
        )
    say(f"{shipment.path}: every byte is as it was shipped; who shipped it was not checked (no --key)")
    return None


def _check_size(shipment: Shipment, target: Path, max_gib: float) -> None:
    files, size, free = len(shipment.manifest["files"]), shipment.layer.size, free_disk_bytes(target)
    if files > MAX_FILES or size > max_gib * 2**30:
        raise ArtifactError(
            f"{shipment.path}: too large",
            got=f"{files} files, {size / 2**30:.2f} GiB",
            expected=f"at most {MAX_FILES} files, {max_gib:g} GiB",
            fix="raise --max-gib if it is meant to be so large",
        )
    if size > free:
        raise UsageError(
            f"{target.parent}: too little room", got=f"{free} bytes free", expected=f"{size}", fix="free some space"
        )


def _stands(place: Path, shipment: Shipment) -> bool:
    """Whether the bundle is there already, whole; a damaged one is said and removed by being replaced."""
    if not place.exists():
        return False
    try:
        return open_artifact(place, stage="bundle").id == shipment.id
    except ArtifactError as error:
        say(f"installing again: {error.what}")
        return False


def _unpack(shipment: Shipment, place: Path, *, elsewhere: bool, max_gib: float) -> None:
    for leftover in place.parent.glob(".*.tmp-*"):  # of a killed run; the root is held, so nobody is at work there
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    with new_folder(place) as folder:
        artifact = unpack_shipment(shipment, folder, max_gib=max_gib)
        check_lineage(artifact)
        if not elsewhere:
            require_fit(artifact, environment_fit(artifact))
        folder.chmod(0o755)
        sync(folder)
        with uninterrupted(), new_folder(place) as aside:
            if place.exists():
                place.rename(aside / "damaged")
            folder.rename(place)
            sync_folder(place.parent)


def _write_signature(path: Path, signature: bytes) -> None:
    staged = path.with_name(f".{path.name}.tmp-")  # a name that the next run clears
    staged.write_bytes(signature)
    sync_folder(staged)
    staged.replace(path)
    sync_folder(path.parent)


def _told(root: Path, place: Path, *, signed: bool, before: str | None) -> dict[str, Any]:
    return {"current": str(root / CURRENT), "path": str(place), "name": place.name, "signed": signed, "before": before}
