"""Verify: the bytes of an artifact; of a bundle its maker, lineage, fit to this machine, and with `run` its answers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from hstu.artifact import Artifact, open_artifact
from hstu.errors import ArtifactError, GateError, MissingBackendError, UsageError
from stages.bundle_lineage import check_lineage
from stages.contract import say
from stages.environment_fit import environment_fit, require_fit
from stages.lineage import lineage_copies
from stages.shipping.install import check_installed_signature, check_shipped_signature, unpack_shipment
from stages.shipping.layout import MARKER, open_shipment
from stages.workspace import FullDisk, interruptible

if TYPE_CHECKING:
    from hstu.tolerances import Tolerance
    from serving.engine import Engine

Golden = Mapping[str, Mapping[str, Mapping[str, Any]]]  # inputs or outputs → entry → tensor

TOP = 10


def verify(
    path: Path, *, run: bool = False, key: Path | None = None, signature: Path | None = None, elsewhere: bool = False
) -> dict[str, Any]:
    """What was checked and found right, of an artifact, a bundle or a shipped bundle (which is unpacked to be read).

    Raises ArtifactError when a byte differs, the lineage does not hold together or the bundle was not signed with
    `key`, UsageError when what bundles alone have is asked of another artifact, MissingBackendError when a bundle's
    default engine cannot run here (unless `elsewhere`), GateError when an engine's answers are not the golden ones.
    """
    if (path / MARKER).exists():
        shipment = open_shipment(path)
        fingerprint = check_shipped_signature(shipment, key) if key is not None else None
        with interruptible(), tempfile.TemporaryDirectory(prefix="verify-") as folder:
            with FullDisk("verify", Path(folder), fix="set TMPDIR to a folder on another disk"):
                artifact = unpack_shipment(shipment, Path(folder))
            return _verify(artifact, path, run=run, elsewhere=elsewhere) | _signed(fingerprint)
    artifact = open_artifact(path)
    for option, given in (("--run", run), ("--key", key), ("--signature", signature)):
        if given and artifact.stage != "bundle":
            raise UsageError(
                f"{path}: only a bundle carries golden answers and a signature",
                got=f"{option} with an artifact of {artifact.stage}",
                fix=f"leave {option} away, or pass the bundle's folder",
            )
    fingerprint = check_installed_signature(artifact, key, signature=signature) if key is not None else None
    return _verify(artifact, path, run=run, elsewhere=elsewhere) | _signed(fingerprint)


def _signed(fingerprint: str | None) -> dict[str, Any]:
    return {} if fingerprint is None else {"signed_with": fingerprint}


def _verify(artifact: Artifact, path: Path, *, run: bool, elsewhere: bool) -> dict[str, Any]:
    files = artifact.manifest["files"]
    result: dict[str, Any] = {
        "path": str(path),
        "stage": artifact.stage,
        "id": artifact.id,
        "files": len(files),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "inputs": dict(artifact.manifest["inputs"]),
    }
    if artifact.stage == "bundle":
        result["lineage"] = check_lineage(artifact)
        result["environment"] = environment_fit(artifact)
        if not elsewhere:
            require_fit(artifact, result["environment"])
    if run:
        result["golden"] = replay(artifact)
    return result


def render(result: Mapping[str, Any]) -> str:
    """The same for a person."""
    lines = [
        f"{result['path']}: {result['stage']} {result['id'][:12]}",
        f"  {result['files']} files, {result['bytes'] / 2**20:.1f} MiB: every byte is as it was written",
    ]
    if "signed_with" in result:
        lines.append(f"  signed with the key {result['signed_with'][:12]}")
    if "lineage" in result:
        lines.append(f"  lineage of {len(result['lineage'])} artifacts holds together")
    for engine, found in result.get("environment", {}).items():
        versions = f"{found['product']} {found['built_with']}"
        versions += "" if found["here"] in (None, found["built_with"]) else f" (here {found['here']})"
        lines.append(f"  {engine}: {found['status']}, {versions}" + (f": {found['why']}" if "why" in found else ""))
    for engine, found in result.get("golden", {}).items():
        if "skipped" in found:
            lines.append(f"  {engine}: not replayed, {found['skipped']}")
        for entry, figures in found.get("entries", {}).items():
            told = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
            lines.append(f"  {engine} {entry}: golden answers reproduced, {told}")
    return "\n".join(lines)


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
