"""Lineage: what an artifact was made from, up to its sources.

An artifact's manifest names its inputs by id, which is the SHA-256 of their manifests. So a parent is found
wherever bytes of that hash lie: in a bundle's `lineage/` folder, or in the artifacts folder. A parent that was
replaced or removed since is said to be so; nothing is taken for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu.artifact import MANIFEST, open_artifact
from hstu.errors import ArtifactError
from hstu.manifest import parse_manifest

LINEAGE = "lineage"
_TOLD = ("source", "format", "path", "precision", "backend", "version")  # parameters worth a word in the tree


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A manifest that was found: its id, its content, and where it lay."""

    id: str
    manifest: Mapping[str, Any]
    where: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One artifact of the tree. `manifest` is None when it is not to be found; `note` then says what is known."""

    name: str
    id: str
    where: str | None
    note: str | None
    manifest: Mapping[str, Any] | None
    inputs: tuple[Node, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the parameters and toolchain of every artifact that was found."""
        manifest = self.manifest or {}
        told = {key: manifest[key] for key in ("stage", "params", "toolchain", "platform") if key in manifest}
        return {
            "name": self.name,
            "id": self.id,
            "where": self.where,
            "note": self.note,
            **told,
            "inputs": [node.to_dict() for node in self.inputs],
        }

    @property
    def text(self) -> str:
        """One line an artifact, what it was made from indented below it; one told before is told by its id alone."""
        return "\n".join(self._lines("", set()))

    @property
    def missing(self) -> list[str]:
        """Names of the artifacts of the tree that are not to be found."""
        own = [] if self.manifest is not None else [self.name]
        return sorted({*own, *(name for node in self.inputs for name in node.missing)})

    def _lines(self, indent: str, told: set[str]) -> list[str]:
        details = [self.note or ""]
        again = self.id in told and bool(self.inputs)
        if self.manifest is not None and not again:
            params, platform = self.manifest["params"], self.manifest.get("platform", {})
            details += [f"{key}={params[key]}" for key in _TOLD if params.get(key) is not None]
            details += ["built, not executed"] if platform.get("executed") is False else []
        details += ["(see above)"] if again else []
        lines = [f"{indent}{self.name}  {self.id[:12]}  {'  '.join(filter(None, details))}".rstrip()]
        told.add(self.id)
        if not again:
            for node in self.inputs:
                lines += node._lines(f"{indent}  ", told)
        return lines


def lineage(path: Path, artifacts: Path) -> Node:
    """The tree from the artifact at `path` up to its sources.

    Raises ArtifactError when `path` is no artifact, or a manifest in a bundle's lineage folder is not whole.
    """
    artifact = open_artifact(path, verify=False)
    standing = _in_artifacts(artifacts)
    copies = {copy.id: copy for copy in [*lineage_copies(path).values(), *standing.values()]}
    here = {name: copy.id for name, copy in standing.items()}
    own = Copy(id=artifact.id, manifest=artifact.manifest, where=str(path))
    return _node(artifact.stage, own, copies, here)


def lineage_copies(bundle: Path) -> dict[str, Copy]:
    """The manifests in a bundle's `lineage/` folder by file stem, such as build-engine-fp32; empty without one."""
    folder = bundle / LINEAGE
    found: dict[str, Copy] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        data = path.read_bytes()
        manifest = parse_manifest(data, source=str(path), fix="run the bundle stage again")
        where = f"{LINEAGE}/{path.name}"
        found[path.stem] = Copy(id=hashlib.sha256(data).hexdigest(), manifest=manifest, where=where)
    return found


def _in_artifacts(artifacts: Path) -> dict[str, Copy]:
    """Every artifact that stands in the artifacts folder by name, such as build-engine/fp32."""
    found: dict[str, Copy] = {}
    for pattern in (f"*/{MANIFEST}", f"*/*/{MANIFEST}"):
        for path in sorted(artifacts.glob(pattern)):
            name = path.parent.relative_to(artifacts).as_posix()
            if any(part.startswith(".") for part in name.split("/")) or name.partition("/")[0] in found:
                continue  # what a killed run left, or a folder within an artifact
            try:
                artifact = open_artifact(path.parent, verify=False)
            except ArtifactError:
                continue  # not whole: the id it should have will be told as missing
            found[name] = Copy(id=artifact.id, manifest=artifact.manifest, where=str(path.parent))
    return found


def _node(name: str, copy: Copy, copies: Mapping[str, Copy], here: Mapping[str, str]) -> Node:
    inputs = []
    for parent, identity in sorted(copy.manifest["inputs"].items()):
        found = copies.get(identity)
        if found is not None:
            inputs.append(_node(parent, found, copies, here))
            continue
        now = here.get(parent)
        note = f"replaced since: {parent} is now {now[:12]}" if now else "not to be found: removed, or made elsewhere"
        inputs.append(Node(name=parent, id=identity, where=None, note=note, manifest=None, inputs=()))
    return Node(name=name, id=copy.id, where=copy.where, note=None, manifest=copy.manifest, inputs=tuple(inputs))
