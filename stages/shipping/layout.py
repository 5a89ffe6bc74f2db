"""A shipped bundle: an OCI image layout, which registries carry and public tools (skopeo, podman) read.

oci-layout, index.json                 one image, named by the bundle's version
blobs/sha256/…                         the image's manifest, its config, one layer with the bundle (`archive`), and,
                                       when it is signed, one with `bundle.sig`

All files but the layers follow from the bundle's version and id and the layers' digests, so a reader writes them anew
and compares bytes: JSON that somebody else wrote is searched for the layers' digests and for nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu.artifact import MANIFEST, files_below
from hstu.errors import ArtifactError
from hstu.manifest import parse_manifest
from stages.shipping.archive import COPY_AGAIN, FOLDER, archive_size, read_manifest, unpack_one
from stages.versions import version_key

SIGNATURE = "bundle.sig"
MARKER = "oci-layout"
_INDEX = "index.json"
_BLOBS = "blobs/sha256/"
_IMAGE = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_MAX_DOCUMENT = 1 << 20
_MAX_SIGNATURE = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Blob:
    """What a layer's bytes hash to, and how many they are."""

    sha256: str
    size: int

    @property
    def path(self) -> str:
        return _BLOBS + self.sha256


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipment:
    """A shipped bundle whose every file but the bundle's layer has been checked; `archive.unpack` checks that."""

    path: Path
    version: str
    id: str
    manifest: Mapping[str, Any]
    layer: Blob
    signature: bytes | None

    @property
    def archive(self) -> Path:
        return self.path / self.layer.path


def documents(version: str, identity: str, layers: list[Blob]) -> dict[str, bytes]:
    """Every file of the layout but the layers, by path; keys stand in the order in which OCI's own tools write them."""
    config = _encode(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": {"hstu.bundle.id": identity, "hstu.bundle.version": version}},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.sha256}" for layer in layers]},
        }
    )
    image = _encode(
        {
            "schemaVersion": 2,
            "mediaType": _IMAGE,
            "config": _descriptor(_CONFIG, _blob(config)),
            "layers": [_descriptor(_LAYER, layer) for layer in layers],
            "annotations": {
                "org.opencontainers.image.title": "hstu-bundle",
                "org.opencontainers.image.version": version,
            },
        }
    )
    name = {"org.opencontainers.image.ref.name": version}
    index = _encode(
        {"schemaVersion": 2, "manifests": [{**_descriptor(_IMAGE, _blob(image)), "annotations": name}]},
    )
    return {
        MARKER: b'{"imageLayoutVersion": "1.0.0"}',  # with the space that containers/image writes
        _INDEX: index,
        _blob(config).path: config,
        _blob(image).path: image,
    }


def open_shipment(folder: Path) -> Shipment:
    """The shipped bundle at `folder`, its layer not yet read; ArtifactError when any other byte of it is wrong."""
    if not (folder / MARKER).is_file():
        raise ArtifactError(
            f"{folder}: there is no shipped bundle here", expected=f"a folder with {MARKER}", fix=COPY_AGAIN
        )
    try:
        return _open(folder)
    except OSError as error:
        raise ArtifactError(f"{error.filename or folder}: cannot be read ({error.strerror})", fix=COPY_AGAIN) from None


def _open(folder: Path) -> Shipment:
    present = set(files_below(folder))
    image = _find(folder, _INDEX, lambda index: [index["manifests"][0]["digest"]])[0]
    digests = _find(folder, _BLOBS + image, lambda image: [layer["digest"] for layer in image["layers"]])
    layers = [Blob(sha256=digest, size=(folder / _BLOBS / digest).stat().st_size) for digest in digests]
    if not 1 <= len(layers) <= 2:
        raise ArtifactError(
            f"{folder}: not a shipped bundle", got=f"{len(layers)} layers", expected="1 or 2", fix=COPY_AGAIN
        )
    archive = folder / layers[0].path
    data = read_manifest(archive)
    manifest = parse_manifest(data, source=f"{archive} {FOLDER}{MANIFEST}", fix=COPY_AGAIN)
    version = bundle_version(manifest, source=str(folder))
    size = archive_size(manifest, len(data))
    if layers[0].size != size:
        raise ArtifactError(
            f"{archive}: another size than its manifest gives it", got=layers[0].size, expected=size, fix=COPY_AGAIN
        )
    identity = hashlib.sha256(data).hexdigest()
    expected = documents(version, identity, layers)
    wanted = expected.keys() | {layer.path for layer in layers}
    if present != wanted:
        raise ArtifactError(
            f"{folder}: not the files of a shipped bundle",
            got=f"missing {sorted(wanted - present)}, extra {sorted(present - wanted)}",
            fix=COPY_AGAIN,
        )
    for name, document in expected.items():
        if _read(folder / name, _MAX_DOCUMENT) != document:
            raise ArtifactError(f"{folder / name}: not as `ship` writes it", fix=COPY_AGAIN)
    signature = _signature(folder / layers[1].path, layers[1].sha256) if len(layers) == 2 else None
    return Shipment(path=folder, version=version, id=identity, manifest=manifest, layer=layers[0], signature=signature)


def bundle_version(manifest: Mapping[str, Any], *, source: str) -> str:
    """The semantic version in a bundle's manifest; ArtifactError when it is no bundle's."""
    version = manifest["params"].get("version")
    if manifest["stage"] != "bundle" or not isinstance(version, str) or version_key(version) is None:
        raise ArtifactError(
            f"{source}: not a bundle with a version",
            got=f"stage {manifest['stage']}, version {version!r}",
            expected="stage bundle, version MAJOR.MINOR.PATCH",
            fix="run the bundle stage again",
        )
    return version


def _signature(path: Path, sha256: str) -> bytes:
    archive = _read(path, _MAX_SIGNATURE)
    if hashlib.sha256(archive).hexdigest() != sha256:
        raise ArtifactError(f"{path}: not the signature that was written", expected=f"sha256 {sha256}", fix=COPY_AGAIN)
    return unpack_one(archive, SIGNATURE, source=str(path))


def _find(folder: Path, name: str, look: Any) -> list[str]:
    """The SHA-256 digests that `look` finds in a JSON file; ArtifactError when they are not there."""
    data = _read(folder / name, _MAX_DOCUMENT)
    try:
        found = [_DIGEST.fullmatch(digest) for digest in look(json.loads(data))]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError):
        found = [None]
    digests = [match[1] for match in found if match]
    if len(digests) != len(found) or not digests:
        raise ArtifactError(f"{folder / name}: not as `ship` writes it", fix=COPY_AGAIN)
    return digests


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ArtifactError(f"{path}: too large", expected=f"at most {limit} bytes", fix=COPY_AGAIN)
    return data


def _descriptor(media_type: str, blob: Blob) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{blob.sha256}", "size": blob.size}


def _blob(data: bytes) -> Blob:
    return Blob(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
