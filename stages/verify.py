"""Verify: every byte of an artifact, its lineage, and with `run` the answers of every engine in a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from hstu.artifact import Artifact, open_artifact
from hstu.errors import ArtifactError, GateError, MissingBackendError, UsageError
from stages.contract import say
from stages.lineage import Copy, lineage_copies

if TYPE_CHECKING:
    from hstu.tolerances import Tolerance
    from serving.engine import Engine

Golden = Mapping[str, Mapping[str, Mapping[str, Any]]]  # inputs or outputs → entry → tensor

# Which files of a bundle are copies of an upstream artifact's: stage → (folder below the bundle, only these).
_COPIED: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "checkpoint": ("", ("config.json", "model.safetensors", "vocabulary.json")),
    "export-onnx": ("onnx/", None),
    "build-engine": ("engines/{variant}/", None),
}
TOP = 10


def verify(path: Path, *, run: bool = False) -> dict[str, Any]:
    """What was checked and found right.

    Raises ArtifactError when a byte differs or the lineage does not hold together, UsageError when `run`
    is asked of what is no bundle, GateError when an engine's answers are not the golden ones.
    """
    artifact = open_artifact(path)
    bundle = artifact.stage == "bundle"
    if run and not bundle:
        raise UsageError(
            f"{path}: only a bundle carries golden answers to replay",
            got=f"an artifact of {artifact.stage}",
            fix="leave --run away, or pass the bundle's folder",
        )
    files = artifact.manifest["files"]
    result: dict[str, Any] = {
        "path": str(path),
        "stage": artifact.stage,
        "id": artifact.id,
        "files": len(files),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "inputs": dict(artifact.manifest["inputs"]),
    }
    if bundle:
        result["lineage"] = check_lineage(artifact)
    if run:
        result["golden"] = replay(artifact)
    return result


def render(result: Mapping[str, Any]) -> str:
    """The same for a person."""
    lines = [
        f"{result['path']}: {result['stage']} {result['id'][:12]}",
        f"  {result['files']} files, {result['bytes'] / 2**20:.1f} MiB: every byte is as it was written",
    ]
    if "lineage" in result:
        lines.append(f"  lineage of {len(result['lineage'])} artifacts holds together")
    for engine, found in result.get("golden", {}).items():
        if "skipped" in found:
            lines.append(f"  {engine}: not replayed, {found['skipped']}")
        for entry, figures in found.get("entries", {}).items():
            told = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
            lines.append(f"  {engine} {entry}: golden answers reproduced, {told}")
    return "\n".join(lines)


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


def replay(artifact: Artifact) -> dict[str, Any]:
    """Figures by engine and entry; GateError when an answer is further from the golden one than its precision allows.

    An engine that cannot run here (only built, or its library is missing) is reported as skipped, with the reason.
    """
    from serving.engine import open_engine, read_spec
    from serving.engines.torch import open_torch_engine

    path = artifact.path
    golden = {kind: _arrays(artifact.file(f"golden/{kind}.npz")) for kind in ("inputs", "outputs")}
    results: dict[str, Any] = {
        "torch": _replay_engine("torch", open_torch_engine(path), golden, _limits(artifact, "torch", "fp32"))
    }
    engines = sorted({name.split("/")[1] for name in artifact.manifest["files"] if name.startswith("engines/")})
    for name in engines:
        spec = read_spec(path / "engines" / name)
        limits = _limits(artifact, name, spec.precision)
        if not spec.executed:
            results[name] = {"skipped": f"built for {spec.backend}, which does not execute on this machine"}
        else:
            try:
                engine = open_engine(path / "engines" / name)
            except MissingBackendError as error:
                results[name] = {"skipped": error.what}
            else:
                results[name] = _replay_engine(name, engine, golden, limits)
        if "skipped" in results[name]:
            say(f"{name}: not replayed, {results[name]['skipped']}")
    return results


def _limits(artifact: Artifact, name: str, precision: str) -> Tolerance:
    """What the engine was gated with: its precision's tolerance, and those limits that build-engine was given."""
    from hstu.tolerances import TOLERANCES

    if precision not in TOLERANCES:
        raise ArtifactError(f"{name}: no such precision", got=precision, expected=", ".join(TOLERANCES))
    built = lineage_copies(artifact.path).get(f"build-engine-{name}")
    params = built.manifest["params"] if built else {}
    given = {limit: params[limit] for limit in asdict(TOLERANCES[precision]) if params.get(limit) is not None}
    return replace(TOLERANCES[precision], **given)


def _replay_engine(name: str, engine: Engine, golden: Golden, tolerance: Tolerance) -> dict[str, Any]:
    from serving.engine import check_feeds
    from stages.returning import histories_from_feeds, returning_answers

    entries: dict[str, dict[str, float]] = {}
    try:
        inputs = dict(golden["inputs"])
        inputs["extend"] = inputs["retrieve"]  # the same users, coming back
        for entry, feeds in inputs.items():
            if entry == "extend":
                answers = returning_answers(engine, histories_from_feeds(feeds))
            else:
                check_feeds(engine.config, entry, feeds)  # type: ignore[arg-type]
                answers = engine.run(entry, feeds)  # type: ignore[arg-type]
            expected = golden["outputs"].get("retrieve" if entry == "extend" else entry, {})
            figures = compare(answers, expected, tolerance.max_abs_error)
            within = figures["max_abs_error"] <= tolerance.max_abs_error  # False for NaN
            within &= figures.get("min_cosine", 1.0) >= tolerance.min_cosine
            within &= figures.get("top10_overlap", 1.0) >= tolerance.min_top10_overlap
            if not within:
                raise GateError(
                    f"{name}: the {entry} entry does not give the golden answers",
                    got=", ".join(f"{key} {value:.4g}" for key, value in figures.items()),
                    expected=f"{engine.precision}: {tolerance}",
                    fix="build the engine again on this machine: build-engine, then bundle",
                )
            entries[entry] = figures
    finally:
        engine.close()
    return {"backend": engine.backend, "precision": engine.precision, "entries": entries}


def compare(answers: Mapping[str, Any], golden: Mapping[str, Any], tie: float) -> dict[str, float]:
    """max_abs_error of the float outputs, and for retrieve min_cosine and top10_overlap with the golden answers.

    An item counts as found in the golden top 10 when its golden score is within 2·`tie` of the tenth: what two
    runtimes may order differently is not an error. Raises GateError when names or shapes differ.
    """
    import numpy as np

    shapes = {name: value.shape for name, value in answers.items()}
    expected = {name: value.shape for name, value in golden.items()}
    if shapes != expected:
        raise GateError("the outputs are not those of the golden answers", got=shapes, expected=expected)
    floats = [name for name, value in golden.items() if value.dtype == np.float32]
    errors = [np.abs(answers[name] - golden[name]).max(initial=0.0) for name in floats]
    figures = {"max_abs_error": float(np.max(errors))}
    if "user_embedding" in golden:
        a, b = answers["user_embedding"].astype(np.float64), golden["user_embedding"].astype(np.float64)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        figures["min_cosine"] = float(((a * b).sum(axis=1) / np.maximum(norms, 1e-12)).min(initial=1.0))
    if "top_item_ids" in golden:
        figures["top10_overlap"] = _overlap(answers["top_item_ids"], golden["top_item_ids"], golden["top_scores"], tie)
    return figures


def _overlap(found: Any, golden: Any, scores: Any, tie: float) -> float:
    import numpy as np

    top = min(TOP, golden.shape[1])
    limit = scores[:, top - 1 : top] - 2 * tie
    hits = [
        np.isin(row[:top], ids[values >= low]).mean()
        for row, ids, values, low in zip(found, golden, scores, limit, strict=True)
    ]
    return float(np.mean(hits)) if hits else 1.0


def _arrays(path: Path) -> dict[str, dict[str, Any]]:
    """The arrays of a golden file by entry and tensor."""
    import numpy as np

    arrays: dict[str, dict[str, Any]] = {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            for name in stored.files:
                entry, _, tensor = name.partition("/")
                arrays.setdefault(entry, {})[tensor] = stored[name]
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ArtifactError(f"{path}: not golden arrays ({error})", fix="run the bundle stage again") from None
    return arrays
