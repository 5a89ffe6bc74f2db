"""Stage benchmark: every runtime of the bundle beside eager PyTorch, answers checked first, then timed in rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hstu.artifact import Artifact, encode_json
from hstu.config import HSTUConfig
from hstu.errors import GateError
from stages.contract import Outcome, Stage, Workspace, say, write_report
from stages.gate_checks import MAX_CORE_WAIT
from stages.measure.cases import Case, Cell, find_case
from stages.parameters import require

if TYPE_CHECKING:
    from stages.measure.interleave import Measurement
    from stages.measure.session import Session

SCHEMA = 1
FILE = "benchmark.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkParams:
    """What is measured and how long; see params.yaml."""

    cases: tuple[str, ...]
    threads: tuple[Literal["one", "all"], ...]
    cell_seconds: float
    min_rounds: int
    max_rounds: int
    first_answer_s: float
    compile_batches: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        for name in self.cases:
            find_case(name)
        for name, values in (("cases", self.cases), ("threads", self.threads)):
            require(len(set(values)) == len(values) >= 1, f"benchmark.{name}: names must be distinct",
                    got=list(values), expected="at least one, none twice")  # fmt: skip
        require(self.cell_seconds > 0, "benchmark.cell_seconds: not positive", got=self.cell_seconds, expected="> 0")
        require(1 <= self.min_rounds <= self.max_rounds, "benchmark.min_rounds, max_rounds: out of range",
                got=(self.min_rounds, self.max_rounds), expected="1 <= min_rounds <= max_rounds")  # fmt: skip
        require(self.first_answer_s > 0, "benchmark.first_answer_s: not positive",
                got=self.first_answer_s, expected="> 0")  # fmt: skip
        require(min(self.compile_batches, default=1) >= 1, "benchmark.compile_batches: not positive",
                got=list(self.compile_batches), expected="batch sizes")  # fmt: skip
        require(self.seed >= 0, "benchmark.seed: negative", got=self.seed, expected=">= 0")


def run(params: BenchmarkParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Write `benchmark.json`; a runtime whose answers are wrong is in it as such, without any timing."""
    from stages.measure.environment import describe_environment

    bundle = inputs["bundle"]
    sessions = [_measure(find_case(name), bundle, params) for name in params.cases]
    calibration = sorted(value for session in sessions for value in session.calibration_ms)
    report = {
        "schema": SCHEMA,
        "bundle": bundle.id,
        "environment": describe_environment() | {"calibration_ms": round(calibration[len(calibration) // 2], 3)},
        "cases": {
            session.case.name: {
                "summary": session.case.summary,
                "model": session.config.to_dict(),
                "ceiling_gflops": session.ceilings,
            }
            for session in sessions
        },
        "results": [row for session in sessions for row in session.rows],
        "skipped": [row for session in sessions for row in session.skipped],
    }
    (folder / FILE).write_bytes(encode_json(report))
    return Outcome(metrics=_metrics(report["results"]))  # type: ignore[arg-type]


def _measure(case: Case, bundle: Artifact, params: BenchmarkParams) -> Session:
    from stages.measure import case_models
    from stages.measure.interleave import Effort
    from stages.measure.runtimes import contestants
    from stages.measure.session import Session

    refused: dict[str, str] = {}
    if case.config is None:
        files = case_models.bundle_files(bundle.path)
    else:
        cases = bundle.path.parent / case_models.FOLDER
        files, refused = case_models.random_files(case.name, case.config, bundle.path, cases)
    session = Session(
        case=case,
        config=HSTUConfig.from_pretrained(files.checkpoint),
        contestants=contestants(files),
        effort=Effort(
            cell_seconds=params.cell_seconds,
            min_rounds=params.min_rounds,
            max_rounds=params.max_rounds,
            first_answer_s=params.first_answer_s,
            compile_batches=params.compile_batches,
        ),
        seed=params.seed,
        on_cell=_tell,
    )
    session.skipped += [
        {"case": case.name, "runtime": "engine", "precision": name, "reason": why} for name, why in refused.items()
    ]
    for mode in params.threads:
        session.measure(mode)
    for row in session.skipped:
        say(f"benchmark: {row['case']}: {row['runtime']} {row['precision']} is not measured: {row['reason']}")
    return session


def _tell(cell: Cell, found: Sequence[Measurement]) -> None:
    import numpy as np

    parts = []
    for item in found:
        name = str(item.contestant)
        if not item.check.correct:
            parts.append(f"{name} WRONG (error {item.check.max_abs_error:.2g})")
        elif item.seconds:
            busy = f", waited {item.wait_share:.0%}" if item.wait_share > MAX_CORE_WAIT else ""
            parts.append(f"{name} {np.median(item.seconds) * 1e3:.3g} ms ({np.median(item.ratios):.2f}x{busy})")
    say(f"benchmark: {cell}: {', '.join(parts)}")


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `dvc metrics` shows: median latency and ratio to eager, on all threads, nothing padded."""
    metrics: dict[str, Any] = {}
    for row in rows:
        if row["latency_ms"] is not None and row["thread_mode"] == "all" and row["occupancy"] == 1.0:
            name = row["runtime"] if row["runtime"] != "engine" else f"engine-{row['backend']}-{row['precision']}"
            place = metrics.setdefault(row["case"], {}).setdefault(f"{row['entry']}-batch-{row['batch']}", {})
            place[name] = {"p50_ms": row["latency_ms"]["p50"], "ratio_to_eager": row["ratio_to_eager"]}
    return metrics


def publish(artifact: Artifact, workspace: Workspace) -> None:
    """`reports/` holds benchmark.json, the plots and report.html; GateError when any answer was wrong.

    Cases that were not run this time stay, as long as they are of the same bundle and the same machine.
    """
    from stages.report import write_plots, write_report_page

    current = json.loads(artifact.file(FILE).read_bytes())
    path = workspace.reports / FILE
    merged = merge(current, json.loads(path.read_bytes()) if path.is_file() else None)
    write_report(path, merged)
    write_plots(merged, workspace.reports)
    write_report_page(workspace)
    wrong = [row for row in merged["results"] if not row["correct"]]
    if wrong:
        row = wrong[0]
        raise GateError(
            f"benchmark: {len(wrong)} of {len(merged['results'])} results are wrong; they were not timed",
            got=f"{row['case']} {row['entry']} B={row['batch']} {row['runtime']} {row['precision']}: "
            f"max abs error {row['max_abs_error']}",
            expected="the tolerance of the precision (hstu/tolerances.py)",
            fix="`python cli.py verify artifacts/bundle --run` tells whether the bundle itself is at fault",
        )


def merge(current: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """`current` with the cases of `earlier` that it lacks, when both are of one schema, bundle and machine."""

    def setting(report: Mapping[str, Any]) -> tuple[Any, ...]:
        environment = {k: v for k, v in report.get("environment", {}).items() if k != "calibration_ms"}
        return report.get("schema"), report.get("bundle"), environment

    if earlier is None:
        return current
    others = [name for name in earlier.get("cases", {}) if name not in current["cases"]]
    if not others:
        return current
    if setting(earlier) != setting(current):
        say(f"benchmark: dropping {', '.join(others)}: measured on another bundle or another machine")
        return current
    say(f"benchmark: keeping {', '.join(others)} as measured before on this bundle and this machine")
    kept = {key: [row for row in earlier[key] if row["case"] in others] for key in ("results", "skipped")}
    return current | {
        "cases": current["cases"] | {name: earlier["cases"][name] for name in others},
        "results": current["results"] + kept["results"],
        "skipped": current["skipped"] + kept["skipped"],
    }


STAGE = Stage(
    name="benchmark",
    summary="Measure every runtime of the bundle beside eager PyTorch; write benchmark.json and report.html.",
    params=BenchmarkParams,
    needs=("bundle",),
    toolchain=("torch", "onnxruntime", "numpy"),
    run=run,
    publish=publish,
)
