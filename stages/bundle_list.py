"""The bundles in a folder, installed or not, with the metrics that travel in each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hstu.artifact import MANIFEST, Artifact, open_artifact
from hstu.errors import ArtifactError
from stages.contract import say
from stages.shipping.root import STATE, VERSIONS, current, read_root
from stages.versions import version_key

_TOLD = ("hr_at_10", "ndcg_at_10", "auc_engagement", "num_parameters")  # of the checkpoint, in the table


def list_bundles(folder: Path) -> list[dict[str, Any]]:
    """What is known of every bundle in `folder` (a root of `install`, a folder of bundles, or a bundle), oldest first.

    Manifests are checked, files are not hashed. Raises ArtifactError when `folder` holds no bundle.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: there is no such folder", fix="pass a root of install, or a folder of bundles")
    root = (folder / STATE).exists()
    serving = current(folder) if root else None
    history = read_root(folder).history if root else ()
    rows = [_row(bundle) for bundle in _bundles(folder / VERSIONS if root else folder)]
    if not rows:
        raise ArtifactError(f"{folder}: no bundle in it", fix="pass a root of install, or a folder of bundles")
    for row in rows:
        name = Path(row["path"]).name
        row["state"] = "serves" if name == serving else "served" if name in history else ""
    return sorted(rows, key=lambda row: (version_key(row["version"]) or (), row["id"]))


def render(rows: list[dict[str, Any]]) -> str:
    """The same for a person: a line a bundle and one for each of its engines."""
    lines = []
    for row in rows:
        metrics = "  ".join(f"{name} {_number(row['metrics'][name])}" for name in _TOLD if name in row["metrics"])
        head = f"{row['version']:<10} {row['id'][:12]}  {row['mib']:.1f} MiB  {row['state']:<7} {metrics}"
        lines += [head.rstrip(), f"           {row['path']}"]
        for name, engine in row["engines"].items():
            figures = "  ".join(f"{key} {_number(value)}" for key, value in engine["quality"].items())
            default = " (default)" if name == row["default_engine"] else ""
            lines.append(f"           {name}{default}: {engine['product']} {engine['version']}  {figures}".rstrip())
    return "\n".join(lines)


def describe(bundle: Artifact) -> dict[str, Any]:
    """The description of a bundle: version, engines with their gate's figures, metrics of its checkpoint."""
    try:
        description = json.loads(bundle.file("bundle.json").read_text())
        engines = {
            name: {"product": engine["product"], "version": engine["version"], "quality": quality_of(bundle, name)}
            for name, engine in sorted(description["engines"].items())
        }
        return {
            "version": description["version"],
            "default_engine": description["default_engine"],
            "engines": engines,
            "metrics": dict(description["checkpoint"].get("metrics") or {}),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{bundle.path}/bundle.json: not a bundle's description ({error!r})", fix="run the bundle stage again"
        ) from None


def quality_of(bundle: Artifact, engine: str) -> dict[str, float]:
    """The figures of the gate that an engine passed, one number each; empty when the engine came without them."""
    name = f"engines/{engine}/quality.json"
    if name not in bundle.manifest["files"]:
        return {}
    return dict(json.loads(bundle.file(name).read_text()))


def _bundles(folder: Path) -> Iterator[Artifact]:
    for path in (folder, *sorted(folder.iterdir())):
        if path.name.startswith(".") or path.is_symlink() or not (path / MANIFEST).is_file():
            continue
        try:
            artifact = open_artifact(path, verify=False)
        except ArtifactError as error:
            say(f"left out: {error.what}")
            continue
        if artifact.stage == "bundle":
            yield artifact


def _row(bundle: Artifact) -> dict[str, Any]:
    size = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    return {"path": str(bundle.path), "id": bundle.id, "mib": round(size / 2**20, 3), **describe(bundle)}


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
