"""An artifact: a folder of files and one `manifest.json` that names every byte of it.

The manifest is written last, so a folder without one is not an artifact. It holds the SHA-256 of every
file, the ids of the artifacts it was made from and a checksum of itself, so a changed byte anywhere is
found. The artifact's id is the SHA-256 of the manifest's bytes and so stands for the whole lineage. No
clock, host name or absolute path is in it: the same inputs on the same kind of machine give the same id.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu.errors import ArtifactError
from hstu.manifest import CHECKSUM, MANIFEST, SCHEMA, check_file_name, encode_json, manifest_checksum, parse_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """An opened artifact: `path` holds exactly what `manifest` says (checked when opened with verify)."""

    path: Path
    manifest: Mapping[str, Any]
    id: str

    @property
    def stage(self) -> str:
        return str(self.manifest["stage"])

    @property
    def params(self) -> Mapping[str, Any]:
        return self.manifest["params"]  # type: ignore[no-any-return]

    def file(self, name: str) -> Path:
        """The path of a file the manifest names; ArtifactError when it does not."""
        if name not in self.manifest["files"]:
            raise ArtifactError(
                f"{self.path}: the artifact has no file {name!r}",
                expected=", ".join(sorted(self.manifest["files"])),
                fix=f"run the {self.stage} stage again",
            )
        return self.path / name


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(
    folder: Path,
    *,
    stage: str,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    toolchain: Mapping[str, str],
    platform: Mapping[str, Any] | None = None,
) -> Artifact:
    """Hash every file of `folder`, write its manifest (last), and return the artifact.

    Empty folders are no part of an artifact. Raises ArtifactError on a link, a special file, or a file
    name that could not be carried to another machine.
    """
    files = {}
    for name in sorted(files_below(folder)):
        if name != MANIFEST:
            check_file_name(name, source=str(folder))
            files[name] = {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "stage": stage,
        "params": dict(params),
        "files": files,
        "inputs": dict(inputs),
        "toolchain": dict(toolchain),
    }
    if platform is not None:
        manifest["platform"] = dict(platform)
    manifest[CHECKSUM] = manifest_checksum(manifest)
    data = encode_json(manifest)
    (folder / MANIFEST).write_bytes(data)
    return Artifact(path=folder, manifest=json.loads(data), id=hashlib.sha256(data).hexdigest())


def open_artifact(path: Path, *, stage: str | None = None, verify: bool = True) -> Artifact:
    """Open the artifact at `path`; with `verify` every file is hashed and no file may be extra.

    Raises ArtifactError when the folder is no artifact, is of another stage or schema, or when the
    manifest or any file is missing, extra, a link, unreadable, or differs in a single byte.
    """
    manifest_path = path / MANIFEST
    rerun = f"run the {stage or 'producing'} stage again"
    try:
        if not path.is_dir():
            raise ArtifactError(f"{path}: there is no artifact here", expected=f"a folder with {MANIFEST}", fix=rerun)
        if not manifest_path.is_file() or manifest_path.is_symlink():
            raise ArtifactError(
                f"{path}: not an artifact",
                expected=f"a regular file {MANIFEST} in it",
                fix=f"remove or move the folder, then {rerun}",
            )
        data = manifest_path.read_bytes()
        manifest = parse_manifest(data, source=str(manifest_path), fix=rerun)
        if stage is not None and manifest["stage"] != stage:
            raise ArtifactError(f"{path}: artifact of another stage", got=manifest["stage"], expected=stage, fix=rerun)
        if verify:
            _verify_files(path, manifest, rerun)
    except OSError as error:
        raise ArtifactError(f"{error.filename or path}: cannot be read ({error.strerror})", fix=rerun) from None
    return Artifact(path=path, manifest=manifest, id=hashlib.sha256(data).hexdigest())


def _verify_files(path: Path, manifest: Mapping[str, Any], fix: str) -> None:
    named, present = set(manifest["files"]), set(files_below(path)) - {MANIFEST}
    if named != present:
        raise ArtifactError(
            f"{path}: files differ from the manifest",
            got=f"missing {sorted(named - present)}, extra {sorted(present - named)}",
            expected="exactly the files the manifest names",
            fix=fix,
        )
    for name, expected in manifest["files"].items():
        file = path / name
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ArtifactError(
                f"{file}: wrong size", got=f"{size} bytes", expected=f"{expected['bytes']} bytes", fix=fix
            )
        digest = sha256_file(file)
        if digest != expected["sha256"]:
            raise ArtifactError(
                f"{file}: its bytes are not the ones that were written",
                got=f"sha256 {digest}",
                expected=f"sha256 {expected['sha256']}",
                fix=fix,
            )


def files_below(folder: Path, prefix: str = "") -> Iterator[str]:
    """Every file below `folder` as a POSIX path; ArtifactError on a link or a special file."""
    with os.scandir(folder / prefix) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(folder, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise ArtifactError(
                    f"{folder / name}: an artifact holds regular files only, no links or special files",
                    fix="remove it and run the stage again",
                )


__all__ = [
    "MANIFEST",
    "SCHEMA",
    "Artifact",
    "encode_json",
    "files_below",
    "open_artifact",
    "sha256_file",
    "write_manifest",
]
