"""Stage benchmark: every runtime of the bundle beside eager PyTorch, answers checked first, then timed in rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hstu.artifact import Artifact, encode_json, open_artifact
from hstu.config import HSTUConfig
from hstu.errors import GateError
from stages.contract import Outcome, Stage, Workspace, say, write_report
from stages.gate_checks import MAX_CORE_WAIT
from stages.measure.cases import Case, find_case
from stages.measure.contestants import PEERS
from stages.parameters import require

if TYPE_CHECKING:
    from stages.measure.interleave import Found
    from stages.measure.session import Session

SCHEMA = 1
FILE = "benchmark.json"
CELL = ("case", "entry", "batch", "length", "new_events", "occupancy", "thread_mode")  # what is measured in one go
LISTS = ("results", "scaling", "skipped")
MODES = {  # of the command: parameters that cut the benchmark
    "single": ("benchmark.threads=[one]", "benchmark.batches=[1]"),
    "batch": ("benchmark.threads=[all]", "benchmark.batches=[8, 32]"),
    "comprehensive": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkParams:
    """What is measured and how long; see params.yaml."""

    cases: tuple[str, ...]
    threads: tuple[Literal["one", "all", "scaling"], ...]
    entries: tuple[Literal["retrieve", "rank", "extend", "generate"], ...]
    batches: tuple[int, ...]
    occupancies: tuple[float, ...]
    leave_out: tuple[str, ...]
    cell_seconds: float
    min_rounds: int
    max_rounds: int
    first_answer_s: float
    compile_batches: tuple[int, ...]
    compile_threads: tuple[Literal["one", "all"], ...]
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
        for name, sizes in (("batches", self.batches), ("compile_batches", self.compile_batches)):
            require(min(sizes, default=1) >= 1, f"benchmark.{name}: not positive",
                    got=list(sizes), expected="batch sizes")  # fmt: skip
        require(self.seed >= 0, "benchmark.seed: negative", got=self.seed, expected=">= 0")


def run(params: BenchmarkParams, inputs: Mapping[str, Artifact], folder: Path) -> Outcome:
    """Write `benchmark.json`; a runtime whose answers are wrong is in it as such, without any timing."""
    from stages.measure.environment import describe_environment

    bundle = inputs["bundle"]
    cases: dict[str, Any] = {}
    sessions = []
    for name in params.cases:
        case = find_case(name)
        session, compiled = _measure(case, bundle, params)
        sessions.append(session)
        cases[name] = {
            "summary": case.summary,
            "left_out": case.left_out,
            "model": session.config.to_dict(),
            "compiled": compiled,
        }
    calibration = sorted(value for session in sessions for value in session.calibration_ms)
    report = {
        "schema": SCHEMA,
        "bundle": bundle.id,
        "environment": describe_environment() | {"calibration_ms": round(calibration[len(calibration) // 2], 3)},
        "cases": cases,
        "results": [row for session in sessions for row in session.rows],
        "scaling": [row for session in sessions for row in session.scaling],
        "skipped": [row for session in sessions for row in session.skipped],
    }
    (folder / FILE).write_bytes(encode_json(report))
    return Outcome(metrics=_metrics(report["results"]))  # type: ignore[arg-type]


def compile_cases(workspace: Workspace, names: Sequence[str]) -> None:
    """The models of these cases stand compiled below the artifacts, so that a benchmark of them measures at once."""
    from stages.contract import hold
    from stages.measure import case_models

    with hold(workspace.artifacts):
        bundle = open_artifact(workspace.artifacts / "bundle", stage="bundle")
        for name in names:
            case = find_case(name)
            if case.config is not None:
                files, refused = case_models.random_files(case, bundle.path, workspace.artifacts / case_models.FOLDER)
                built = ", ".join(sorted(files.engines)) or "none"
                say(f"benchmark: {name} stands compiled: engines {built}; refused: {', '.join(refused) or 'none'}")


def _measure(case: Case, bundle: Artifact, params: BenchmarkParams) -> tuple[Session, str | None]:
    """The case measured, and which compiled model that was; None for the bundle's own."""
    from stages.measure import case_models
    from stages.measure.contestants import Compiling, contestants
    from stages.measure.interleave import Effort
    from stages.measure.session import Choice, Session

    refused: dict[str, str] = {}
    if case.config is None:
        files = case_models.bundle_files(bundle.path)
    else:
        files, refused = case_models.random_files(case, bundle.path, bundle.path.parent / case_models.FOLDER)
    session = Session(
        case=case,
        config=HSTUConfig.from_pretrained(files.checkpoint),
        contestants=contestants(files),
        effort=Effort(
            cell_seconds=params.cell_seconds,
            min_rounds=params.min_rounds,
            max_rounds=params.max_rounds,
            first_answer_s=params.first_answer_s,
            compiling=Compiling(batches=params.compile_batches, threads=params.compile_threads),
        ),
        seed=params.seed,
        on_cell=_tell,
        choice=Choice(
            entries=params.entries,
            batches=params.batches,
            occupancies=params.occupancies,
            leave_out=params.leave_out,
        ),
    )
    session.skipped += [
        {"case": case.name, "runtime": "engine", "precision": name, "reason": why} for name, why in refused.items()
    ]
    for mode in params.threads:
        session.measure(mode)
    for row in session.scaling:
        name = f"{row['runtime']} {row['backend']} {row['precision']}"
        say(f"benchmark: {case.name} {name}: {row['threads']} threads are worth {row['scaling']:.2f}")
    for row in session.skipped:
        say(f"benchmark: {row['case']}: {row['runtime']} {row['precision']} is not measured: {row['reason']}")
    return session, None if case.config is None else files.checkpoint.parent.name[:16]


def _tell(found: Found) -> None:
    import numpy as np

    parts = []
    for item in found.measurements:
        name = str(item.contestant)
        if not item.check.correct:
            name += f" WRONG (error {item.check.max_abs_error:.2g})"
        if not item.seconds:
            parts.append(name)
        else:
            busy = f", waited {item.wait_share:.0%}" if item.wait_share > MAX_CORE_WAIT else ""
            ratio = np.median(item.ratios(found.measurements[0]))
            parts.append(f"{name} {np.median(item.seconds) * 1e3:.3g} ms ({ratio:.2f}x{busy})")
    say(f"benchmark: {found.cell}: {', '.join(parts)}")


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `dvc metrics` shows: median latency and ratio to eager, on all threads, nothing padded."""
    metrics: dict[str, Any] = {}
    for row in rows:
        if row["latency_ms"] is not None and row["thread_mode"] == "all" and row["occupancy"] == 1.0:
            name = row["runtime"] if row["precision"] == "fp32" else f"{row['runtime']}-{row['precision']}"
            name = name if row["runtime"] != "engine" else f"engine-{row['backend']}-{row['precision']}"
            new = f"-new-{row['new_events']}" if row["new_events"] else ""
            place = metrics.setdefault(row["case"], {}).setdefault(f"{row['entry']}-batch-{row['batch']}{new}", {})
            place[name] = {"p50_ms": row["latency_ms"]["p50"], "ratio_to_eager": row["ratio_to_eager"]}
    return metrics


def publish(artifact: Artifact, workspace: Workspace) -> None:
    """`reports/` holds benchmark.json, the plots and report.html; GateError when an answer of ours was wrong.

    Cells that were not measured this time stay, as long as they are of the same models and the same machine.
    """
    from stages.report import write_plots, write_report_page, write_summary

    current = json.loads(artifact.file(FILE).read_bytes())
    path = workspace.reports / FILE
    merged = merge(current, json.loads(path.read_bytes()) if path.is_file() else None)
    write_report(path, merged)
    write_plots(merged, workspace.reports)
    write_summary(merged, workspace.reports)
    write_report_page(workspace)
    wrong = [row for row in merged["results"] if not row["correct"] and row["runtime"] not in PEERS]
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
    """`current` with what `earlier` has and it lacks: cells, scaling of cases, and what was skipped there.

    A cell is taken whole, for its ratios are of runtimes that took turns. Nothing is kept of a case whose model
    was compiled anew, and nothing at all when schema, bundle or machine is another.
    """

    def setting(report: Mapping[str, Any]) -> tuple[Any, ...]:
        environment = {k: v for k, v in report.get("environment", {}).items() if k != "calibration_ms"}
        return report.get("schema"), report.get("bundle"), environment

    if earlier is None or not earlier.get("cases"):
        return current
    names = ", ".join(earlier["cases"])
    if setting(earlier) != setting(current):
        say(f"benchmark: dropping earlier results of {names}: measured on another bundle or another machine")
        return current
    same = [
        name
        for name, about in earlier["cases"].items()
        if name not in current["cases"] or about.get("compiled") == current["cases"][name].get("compiled")
    ]
    kept = {key: [row for row in earlier.get(key, []) if row["case"] in same] for key in LISTS}
    measured = {_cell(row) for row in current["results"]}
    kept["results"] = [row for row in kept["results"] if _cell(row) not in measured]
    scaled = {row["case"] for row in current.get("scaling", [])}
    kept["scaling"] = [row for row in kept["scaling"] if row["case"] not in scaled]
    known = {_runtime(row) for key in LISTS for row in current.get(key, [])}
    kept["skipped"] = [row for row in kept["skipped"] if _runtime(row) not in known]
    return current | {
        "cases": {name: earlier["cases"][name] for name in same} | current["cases"],
        **{key: [*kept[key], *current.get(key, [])] for key in LISTS},
    }


def _cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in CELL)


def _runtime(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("case", "runtime", "precision"))


STAGE = Stage(
    name="benchmark",
    summary="Measure every runtime of the bundle beside eager PyTorch; write benchmark.json and report.html.",
    params=BenchmarkParams,
    needs=("bundle",),
    toolchain=("torch", "onnxruntime", "openvino", "numpy"),
    run=run,
    publish=publish,
)
