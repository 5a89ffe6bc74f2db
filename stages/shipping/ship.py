"""Ship: a bundle leaves as one folder that registries carry, the same bytes every time."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from hstu.artifact import MANIFEST, files_below, open_artifact
from hstu.errors import ArtifactError, UsageError
from stages.bundle_lineage import check_lineage
from stages.compiling import progress
from stages.shipping.archive import archive_size, pack, pack_one
from stages.shipping.layout import MARKER, SIGNATURE, Blob, bundle_version, documents
from stages.shipping.signature import digests_of, sign
from stages.workspace import FullDisk, interruptible, new_folder, say, sync, uninterrupted


def ship(bundle: Path, output: Path, *, key: Path | None = None) -> dict[str, Any]:
    """What was written: the bundle at `bundle`, packed and with `key` signed, stands at `output`, whole or not at all.

    The same bundle and key give the same bytes. Raises ArtifactError when a byte of the bundle is wrong, UsageError
    when something stands at `output` or the disk is full, InputError when the key is none.
    """
    artifact = open_artifact(bundle, stage="bundle", verify=False)  # the bytes are checked while they are packed
    named, present = set(artifact.manifest["files"]), set(files_below(bundle)) - {MANIFEST}
    if named != present:
        raise ArtifactError(
            f"{bundle}: files differ from the manifest",
            got=f"missing {sorted(named - present)}, extra {sorted(present - named)}",
            fix="run the bundle stage again",
        )
    version = bundle_version(artifact.manifest, source=str(bundle))
    check_lineage(artifact)
    _check_output(output)
    data = (bundle / MANIFEST).read_bytes()
    if hashlib.sha256(data).hexdigest() != artifact.id:
        raise ArtifactError(f"{bundle}: it changed while it was read", fix="ship it when nothing else writes there")
    signature = sign(digests_of(artifact.manifest, artifact.id), key) if key is not None else None
    size = archive_size(artifact.manifest, len(data))
    _make_room(output)
    full = FullDisk("ship", output.parent, fix="pass --output DIR on another disk")
    with interruptible(), full, new_folder(output) as folder:
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        started = time.perf_counter()
        with progress("packing", total=size) as advance_to, (blobs / "layer").open("xb") as out:
            digest = pack(bundle, artifact.manifest, data, out, advance_to)
        layers = [Blob(sha256=digest, size=size)]
        (blobs / "layer").rename(blobs / digest)
        if signature is not None:
            archive = pack_one(SIGNATURE, signature)
            layers.append(Blob(sha256=hashlib.sha256(archive).hexdigest(), size=len(archive)))
            (folder / layers[-1].path).write_bytes(archive)
        for name, document in documents(version, artifact.id, layers).items():
            (folder / name).write_bytes(document)
        sync(folder)
        seconds = time.perf_counter() - started
        folder.chmod(0o755)  # mkdtemp's 0700 would keep others from copying it
        with uninterrupted():
            folder.rename(output)
    say(f"shipped {size / 1e6:.1f} MB in {seconds:.1f} s ({size / 1e6 / max(seconds, 1e-9):.0f} MB/s)")
    return {
        "path": str(output),
        "version": version,
        "id": artifact.id,
        "layer": f"sha256:{digest}",
        "bytes": size,
        "signed": signature is not None,
    }


def render(result: dict[str, Any]) -> str:
    """The same for a person."""
    signed = "signed" if result["signed"] else "not signed: nobody can tell who made it"
    return (
        f"{result['path']}: bundle {result['version']} {result['id'][:12]}, {result['bytes'] / 1e6:.1f} MB, {signed}\n"
        f"  layer {result['layer']}"
    )


def _make_room(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(output.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"{output}: cannot be written to", fix="pass --output DIR, a folder of yours")


def _check_output(output: Path) -> None:
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        what = "a shipped bundle" if (output / MARKER).is_file() else "something"
        raise UsageError(
            f"{output}: {what} stands here already, and it will not be overwritten",
            fix="remove it, or pass another --output DIR",
        )
