"""What the report is made from: the measurements, the bundle and where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu.artifact import MANIFEST, open_artifact
from hstu.errors import InputError
from stages import conformance
from stages.caching.compare import read_scores
from stages.contract import Workspace
from stages.gate import BASELINE, BENCHMARK, GateParams, Verdict, check, read_metrics
from stages.gate_trials import FILE as TRIALS
from stages.generation.measure import read_report
from stages.ladder import FILE as LADDER
from stages.lineage import lineage_copies
from stages.parameters import load_params

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Everything the report is made from."""

    benchmark: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]  # by file name without suffix
    verdict: Verdict | None  # None: there is no baseline yet
    bundle: Mapping[str, Any]  # its manifest
    description: Mapping[str, Any]  # its bundle.json
    lineage: Mapping[str, tuple[str, Mapping[str, Any]]]  # name → id and manifest
    cache_scores: Sequence[Mapping[str, Any]]  # of `compare-caches`; none when it was not run
    generation: Mapping[str, Any]  # of `generation`; no parts when it was not run
    built_only: Mapping[str, Mapping[str, Any]]  # engines that no device here can run: name → manifest
    ladder: Mapping[str, Any] | None  # of `ladder`; None when it was not climbed
    trials: Mapping[str, Any] | None  # of `gate-trials`; None when there were none
    gpus: Sequence[Mapping[str, Any]]  # what `make gpu-check` wrote, one for each GPU
    conformance: tuple[conformance.Row, ...]  # the matrix of models, entries and precisions; empty when it was not run

    @property
    def rows(self) -> list[Row]:
        return list(self.benchmark["results"])


def gather(workspace: Workspace) -> Evidence:
    """What the page is made from."""
    benchmark = workspace.reports / BENCHMARK
    if not benchmark.is_file():
        raise InputError(f"{benchmark}: there is no benchmark to report", fix="python cli.py benchmark")
    verdict = None
    if (workspace.reports / BASELINE).is_file():
        params = load_params(GateParams, workspace.values.get("gate", {}), section="gate")
        verdict = check(benchmark, workspace.reports / BASELINE, params)
    bundle = open_artifact(workspace.artifacts / "bundle", stage="bundle", verify=False)
    built_only = {}
    for path in sorted((workspace.artifacts / "build-engine").glob(f"*/{MANIFEST}")):
        artifact = open_artifact(path.parent, stage="build-engine", verify=False)
        if artifact.manifest.get("platform", {}).get("executed") is False:
            built_only[path.parent.name] = artifact.manifest
    lineage = {name: (copy.id, copy.manifest) for name, copy in lineage_copies(bundle.path).items()}
    return Evidence(
        benchmark=json.loads(benchmark.read_bytes()),
        metrics=read_metrics(workspace.reports / "metrics"),
        verdict=verdict,
        bundle=bundle.manifest,
        description=json.loads(bundle.file("bundle.json").read_bytes()),
        lineage=lineage | {"bundle": (bundle.id, bundle.manifest)},
        cache_scores=read_scores(workspace.reports),
        generation=read_report(workspace.reports),
        built_only=built_only,
        ladder=read_ladder(workspace.reports),
        trials=_read(workspace.reports / TRIALS),
        gpus=read_gpus(workspace.reports),
        conformance=tuple(conformance.read_rows(workspace.reports / conformance.FILE)),
    )


def read_ladder(reports: Path) -> Mapping[str, Any] | None:
    """What `ladder` measured; None when it was not climbed."""
    return _read(reports / LADDER)


def read_gpus(reports: Path) -> list[Mapping[str, Any]]:
    """What `gpu-check` measured on GPUs; its rehearsals without one are left out."""
    found = [json.loads(path.read_bytes()) for path in sorted((reports / "gpu").glob("*.json"))]
    return [report for report in found if report["backend"] == "tensorrt"]


def _read(path: Path) -> Mapping[str, Any] | None:
    return json.loads(path.read_bytes()) if path.is_file() else None
