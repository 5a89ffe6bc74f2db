"""The lineage that travels in a bundle, held against itself and against the bundle's files."""

from __future__ import annotations

from hstu.artifact import Artifact
from hstu.errors import ArtifactError
from stages.lineage import Copy, lineage_copies

# Which files of a bundle are copies of an upstream artifact's: stage → (folder below the bundle, only these).
_COPIED: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "checkpoint": ("", ("config.json", "model.safetensors", "vocabulary.json")),
    "export-onnx": ("onnx/", None),
    "build-engine": ("engines/{variant}/", None),
}


def check_lineage(artifact: Artifact) -> list[str]:
    """Names of the upstream artifacts of a bundle; ArtifactError unless they are those it was made from.

    Each input has its manifest in `lineage/` with the id the bundle names, these manifests agree about one
    another, and the files copied into the bundle are those they name.
    """
    fix = "run the bundle stage again"
    copies = lineage_copies(artifact.path)
    inputs = artifact.manifest["inputs"]
    names = {name.replace("/", "-"): name for name in inputs}
    if set(copies) != set(names):
        raise ArtifactError(
            f"{artifact.path}: lineage/ does not hold the manifests of the inputs",
            got=sorted(copies),
            expected=sorted(names),
            fix=fix,
        )
    for stem, name in names.items():
        copy = copies[stem]
        _same(f"{artifact.path}: lineage of {name}", copy.id, inputs[name], fix)
        for parent, identity in copy.manifest["inputs"].items():
            if parent in inputs:
                _same(f"{artifact.path}: {name} was made from another {parent}", identity, inputs[parent], fix)
        _check_copied(artifact, name, copy, fix)
    return sorted(inputs)


def _check_copied(artifact: Artifact, name: str, copy: Copy, fix: str) -> None:
    stage, _, variant = name.partition("/")
    if stage not in _COPIED:
        return
    folder, chosen = _COPIED[stage]
    folder = folder.format(variant=variant)
    for file, entry in copy.manifest["files"].items():
        if chosen is not None and file not in chosen:
            continue
        found = artifact.manifest["files"].get(folder + file, {"sha256": "none: the file is not in the bundle"})
        _same(f"{artifact.path}: {folder}{file} is not the file of {name}", found["sha256"], entry["sha256"], fix)


def _same(what: str, got: str, expected: str, fix: str) -> None:
    if got != expected:
        raise ArtifactError(what, got=got, expected=expected, fix=fix)
