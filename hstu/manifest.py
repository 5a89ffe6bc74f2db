"""The bytes of a manifest: canonical JSON that carries its own checksum, and every check on its values.

A manifest is
`{schema, stage, params, files: {path: {sha256, bytes}}, inputs: {artifact: id}, toolchain, [platform], checksum}`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NoReturn

from hstu.errors import ArtifactError

SCHEMA = 1
MANIFEST = "manifest.json"
CHECKSUM = "checksum"
_REQUIRED = {"schema", "stage", "params", "files", "inputs", "toolchain", CHECKSUM}
_OPTIONAL = {"platform"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def encode_json(value: object) -> bytes:
    """Canonical JSON: sorted keys, two-space indent, a newline at the end; the same value, the same bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything in the manifest but the checksum itself."""
    return hashlib.sha256(encode_json({k: v for k, v in manifest.items() if k != CHECKSUM})).hexdigest()


def parse_manifest(data: bytes, *, source: str, fix: str | None = None) -> dict[str, Any]:
    """The manifest in `data`, every value of the right form; ArtifactError (naming `source`) otherwise.

    A single changed byte is found: one that changes no value breaks the canonical form, one that changes
    a value breaks the checksum.
    """

    def refuse(what: str, got: object = None, expected: object = None) -> NoReturn:
        raise ArtifactError(f"{source}: {what}", got=got, expected=expected, fix=fix)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            refuse("a key stands twice in one object", got=", ".join(sorted(key for key, _ in pairs)))
        return values

    try:
        manifest = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        refuse(f"not valid JSON ({error})")
    if not isinstance(manifest, dict):
        refuse("not a manifest", got=type(manifest).__name__, expected="a JSON object")
    if "schema" in manifest and (manifest["schema"] != SCHEMA or isinstance(manifest["schema"], bool)):
        refuse("written for another schema", got=repr(manifest["schema"]), expected=SCHEMA)
    missing, unknown = sorted(_REQUIRED - manifest.keys()), sorted(manifest.keys() - _REQUIRED - _OPTIONAL)
    if missing or unknown:
        refuse("not a manifest of ours", got=f"missing {missing}, unknown {unknown}", expected=sorted(_REQUIRED))
    _check_values(manifest, source=source, refuse=refuse)
    try:
        whole = encode_json(manifest) == data and manifest_checksum(manifest) == manifest[CHECKSUM]
    except (ValueError, RecursionError):  # NaN, or half of a surrogate pair: nothing we wrote
        whole = False
    if not whole:
        refuse("its bytes are not the ones that were written", expected=f"{CHECKSUM} {manifest[CHECKSUM]}")
    return manifest


def check_file_name(name: str, *, source: str) -> None:
    """`name` is a relative POSIX path that stays inside its folder on any machine; ArtifactError otherwise."""
    parts = name.split("/")
    portable = name.isprintable() and "\\" not in name
    if PurePosixPath(name).is_absolute() or not portable or any(part in ("", ".", "..") for part in parts):
        raise ArtifactError(
            f"{source}: not the name of a file of an artifact",
            got=ascii(name),
            expected="a relative POSIX path without .. or unprintable characters",
        )


def _check_values(manifest: Mapping[str, Any], *, source: str, refuse: Any) -> None:
    if not isinstance(manifest["stage"], str):
        refuse("malformed manifest: stage", got=repr(manifest["stage"]), expected="a name")
    for key in ("params", "files", "inputs", "toolchain", "platform"):
        if not isinstance(manifest.get(key, {}), dict):
            refuse(f"malformed manifest: {key}", got=repr(manifest[key])[:80], expected="an object")
    for name, entry in manifest["files"].items():
        check_file_name(name, source=source)
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"sha256", "bytes"}
            or not isinstance(size, int)
            or isinstance(size, bool)
            or size < 0
            or not _is_sha256(entry["sha256"])
            or name == MANIFEST
        ):
            refuse(
                f"malformed manifest: files[{name!r}]",
                got=repr(entry)[:80],
                expected="sha256 (64 hex digits), bytes (>= 0)",
            )
    for name, identity in [*manifest["inputs"].items(), (CHECKSUM, manifest[CHECKSUM])]:
        if not _is_sha256(identity):
            refuse(f"malformed manifest: the id of {name!r}", got=repr(identity)[:80], expected="64 hex digits")
    for name, version in manifest["toolchain"].items():
        if not isinstance(version, str):
            refuse(f"malformed manifest: toolchain[{name!r}]", got=repr(version)[:80], expected="a version")


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
