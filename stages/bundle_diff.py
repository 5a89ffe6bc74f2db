"""What differs between two bundles: parameters, weights, metrics, engines and tools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hstu.artifact import Artifact, open_artifact
from stages.bundle_list import describe
from stages.lineage import lineage_copies

WEIGHTS = "model.safetensors"


def diff_bundles(a: Path, b: Path) -> dict[str, Any]:
    """The differences from the bundle at `a` to the one at `b`, each value as [in a, in b]; every byte is verified.

    Raises ArtifactError when one of them is no bundle, or not whole.
    """
    one, other = open_artifact(a, stage="bundle"), open_artifact(b, stage="bundle")
    old, new = describe(one), describe(other)
    files = {kind: sorted(names) for kind, names in _files(one, other).items()}
    return {
        "a": {"path": str(a), "version": old["version"], "id": one.id},
        "b": {"path": str(b), "version": new["version"], "id": other.id},
        "params": _changed(_of_stages(one, "params"), _of_stages(other, "params")),
        "weights": _weights(one, other),
        "metrics": _changed(_metrics(old), _metrics(new)),
        "engines": _changed(
            {name: f"{each['product']} {each['version']}" for name, each in old["engines"].items()},
            {name: f"{each['product']} {each['version']}" for name, each in new["engines"].items()},
        ),
        "toolchain": _changed(_of_stages(one, "toolchain"), _of_stages(other, "toolchain")),
        "files": files,
    }


def render(found: Mapping[str, Any]) -> str:
    """The same for a person."""
    if found["a"]["id"] == found["b"]["id"]:
        return f"the same bundle: {found['a']['version']} {found['a']['id'][:12]}"
    lines = [f"{side}  {found[side]['version']} {found[side]['id'][:12]}  {found[side]['path']}" for side in "ab"]
    for part in ("params", "metrics", "engines", "toolchain"):
        lines += [part, *(f"  {name}: {_text(old)} → {_text(new)}" for name, (old, new) in found[part].items())]
        if not found[part]:
            lines[-1] += ": the same"
    weights = found["weights"]
    changed = weights["changed"]
    lines.append(f"weights: {len(changed)} of {weights['tensors']} tensors changed" if changed else "weights: the same")
    lines += [f"  {name}: {value}" for name, value in changed.items()]
    lines.append("files: " + ", ".join(f"{len(names)} {kind}" for kind, names in found["files"].items()))
    return "\n".join(lines)


def _of_stages(bundle: Artifact, part: str) -> dict[str, Any]:
    """`params` or `toolchain` of the bundle and everything it was made from, by stage and key."""
    manifests = {stem: copy.manifest for stem, copy in lineage_copies(bundle.path).items()}
    manifests["bundle"] = bundle.manifest
    return {f"{stem}.{key}": value for stem, each in sorted(manifests.items()) for key, value in each[part].items()}


def _metrics(description: Mapping[str, Any]) -> dict[str, Any]:
    engines = {f"{name}.{key}": v for name, e in description["engines"].items() for key, v in e["quality"].items()}
    return dict(description["metrics"]) | engines


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = sorted(a.keys() | b.keys())
    return {name: [a.get(name), b.get(name)] for name in names if (name in a, a.get(name)) != (name in b, b.get(name))}


def _weights(one: Artifact, other: Artifact) -> dict[str, Any]:
    """By tensor that is not the same: its largest difference, or why it cannot be compared."""
    if one.manifest["files"][WEIGHTS] == other.manifest["files"][WEIGHTS]:
        return {"tensors": None, "changed": {}}
    import numpy as np
    from safetensors import safe_open

    changed: dict[str, str] = {}
    with safe_open(one.file(WEIGHTS), "np") as a, safe_open(other.file(WEIGHTS), "np") as b:
        names = sorted(set(a.keys()) | set(b.keys()))
        for name in names:
            if name not in a.keys() or name not in b.keys():  # noqa: SIM118 (safe_open is no mapping)
                changed[name] = "added" if name not in a.keys() else "removed"  # noqa: SIM118
                continue
            x, y = a.get_tensor(name), b.get_tensor(name)
            if x.shape != y.shape:
                changed[name] = f"shape {list(x.shape)} → {list(y.shape)}"
            elif not np.array_equal(x, y, equal_nan=True):
                largest = np.abs(x.astype(np.float64) - y.astype(np.float64)).max()
                changed[name] = f"largest difference {largest:.3g}, {np.mean(x != y):.1%} of its values"
    return {"tensors": len(names), "changed": changed}


def _files(one: Artifact, other: Artifact) -> dict[str, set[str]]:
    a, b = one.manifest["files"], other.manifest["files"]
    return {
        "changed": {name for name in a.keys() & b.keys() if a[name] != b[name]},
        "added": b.keys() - a.keys(),
        "removed": a.keys() - b.keys(),
    }


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "–" if value is None else str(value)
