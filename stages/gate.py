"""The gate: is this benchmark worse than the accepted one, beyond what noise explains?

Correctness and quality are held to fixed limits. Speed is compared through ratio_to_eager, which both runs
measured interleaved on their own machine, with the confidence interval of each and the noise between runs;
where that leaves doubt the answer is "inconclusive", which does not fail. What is missing fails.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu.errors import InputError, UsageError
from stages.contract import Workspace, write_report
from stages.gate_checks import MAX_CORE_WAIT, OURS, Check, compare_metrics, compare_results, is_disturbed
from stages.parameters import load_params, require

BENCHMARK = "benchmark.json"
BASELINE = "baseline.json"
SCHEMA = 1
_SHARES = (
    "run_noise", "other_machine_noise", "max_quality_drop", "max_overlap_drop", "max_memory_growth", "max_size_growth",
)  # fmt: skip
_ACCEPT = 'python cli.py gate --accept --reason "why this is the new standard"'


@dataclass(frozen=True, kw_only=True, slots=True)
class GateParams:
    """How much worse is worse; see params.yaml."""

    cases: tuple[str, ...]
    max_slowdown: float
    run_noise: float
    other_machine_noise: float
    max_quality_drop: float
    max_overlap_drop: float
    max_error_growth: float
    max_memory_growth: float
    max_size_growth: float
    noticed_slowdown: float
    openings: int
    rounds: int

    def __post_init__(self) -> None:
        require(bool(self.cases), "gate.cases: none", got=[], expected="at least one case")
        require(0 < self.max_slowdown < 1, "gate.max_slowdown: out of range", got=self.max_slowdown, expected="0..1")
        for name in _SHARES:
            value = getattr(self, name)
            require(0 <= value <= 1, f"gate.{name}: out of range", got=value, expected="0..1")
        require(0 < self.noticed_slowdown < 1, "gate.noticed_slowdown: out of range",
                got=self.noticed_slowdown, expected="0..1")  # fmt: skip
        require(self.openings >= 3 and self.rounds >= 1, "gate.openings, rounds: too few",
                got=(self.openings, self.rounds), expected="openings >= 3, rounds >= 1")  # fmt: skip
        require(self.max_error_growth >= 1, "gate.max_error_growth: out of range",
                got=self.max_error_growth, expected=">= 1")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Every check that was made; the gate passes when none failed."""

    checks: tuple[Check, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        return not any(check.status == "fail" for check in self.checks)

    @property
    def status(self) -> str:
        """pass, fail, or inconclusive: nothing failed, but some speed could not be judged."""
        statuses = {check.status for check in self.checks}
        return next((status for status in ("fail", "inconclusive") if status in statuses), "pass")

    def count(self, status: str) -> int:
        return sum(check.status == status for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "passed": self.passed,
            "note": self.note,
            "checks": [check.to_dict() for check in self.checks],
        }

    @property
    def text(self) -> str:
        """A table: all that failed or could not be judged, every speed group, and how many passed of the rest."""
        shown = [c for c in self.checks if c.status != "pass" or c.kind == "speed of all"]
        shown.sort(key=lambda check: ("fail", "inconclusive", "info", "pass").index(check.status))
        table = [("", "what", "now", "limit"), *((c.status, f"{c.kind}: {c.what}", c.got, c.limit) for c in shown)]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        counts = ", ".join(
            f"{self.count(status)} {status}"
            for status in ("pass", "fail", "inconclusive", "info")
            if self.count(status)
        )
        return "\n".join([*lines, *([self.note] if self.note else []), f"{self.status}: {counts}"])


def run_gate(
    workspace: Workspace, *, baseline: Path | None = None, accept: bool = False, reason: str | None = None
) -> Verdict:
    """Compare `reports/benchmark.json` with the baseline, or make it the baseline with `accept`.

    Raises InputError when a file is missing or not readable, UsageError when a baseline is accepted without a
    reason or with wrong results in it.
    """
    params = load_params(GateParams, workspace.values.get("gate", {}), section="gate")
    benchmark = workspace.reports / BENCHMARK
    baseline = workspace.reports / BASELINE if baseline is None else baseline
    if accept:
        return accept_baseline(benchmark, baseline, params, reason=reason)
    if reason is not None:
        raise UsageError("--reason belongs to --accept", fix=_ACCEPT)
    return check(benchmark, baseline, params)


def check(benchmark: Path, baseline: Path, params: GateParams) -> Verdict:
    """Every row and metric of `baseline` against `benchmark` and the folder `metrics/` beside it."""
    current = _read(benchmark, "a benchmark", fix="python cli.py benchmark")
    accepted = _read(baseline, "a baseline", fix=f"accept the current benchmark as the first one: {_ACCEPT}")
    checks = compare_results(current, accepted, params)
    note = ""
    if "metrics" in accepted:
        checks += compare_metrics(read_metrics(benchmark.parent / "metrics"), accepted["metrics"], params)
    else:
        note = "the baseline holds no metrics of the stages: their quality was not compared"
    return Verdict(checks=tuple(checks), note=note)


def accept_baseline(benchmark: Path, baseline: Path, params: GateParams, *, reason: str | None) -> Verdict:
    """`baseline` holds the current benchmark, the stages' metrics and the reason."""
    if reason is None or not reason.strip():
        raise UsageError("a baseline is accepted for a reason", fix=_ACCEPT)
    current = _read(benchmark, "a benchmark", fix="python cli.py benchmark")
    rows = [row for row in current["results"] if row["case"] in params.cases]
    missing = sorted(set(params.cases) - {row["case"] for row in rows})
    wrong = [row for row in rows if not row["correct"] and row["runtime"] in OURS]
    if missing or wrong:
        raise UsageError(
            f"{benchmark}: this cannot become the baseline",
            got=f"{len(wrong)} wrong results, no results of {', '.join(missing) or 'none'}",
            expected=f"right results of {', '.join(params.cases)}",
            fix="python cli.py benchmark",
        )
    disturbed = [row for row in rows if is_disturbed(row)]
    if 2 * len(disturbed) > len(rows):  # the rest are marked, and the gate does not judge them
        raise UsageError(
            f"{benchmark}: measured while other work had the cores, so no standard for speed",
            got=f"{len(disturbed)} of {len(rows)} results waited for a core more than {MAX_CORE_WAIT:.0%} of the time",
            expected="at most one in two",
            fix="let the machine do nothing else and run: python cli.py benchmark",
        )
    kept = {
        key: {name: value for name, value in current[key].items() if name in params.cases}
        if key == "cases"
        else [row for row in current[key] if row["case"] in params.cases]
        for key in ("cases", "results", "skipped")
    }
    metrics = read_metrics(benchmark.parent / "metrics")
    metrics.pop("benchmark", None)  # the same figures as in the results
    write_report(baseline, {**current, **kept, "metrics": metrics, "reason": reason.strip()})
    return Verdict(checks=(), note=f"{baseline}: accepted, because: {reason.strip()}")


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics that stages wrote, by file name without suffix."""
    return {path.stem: _read(path, "metrics", fix="run the stage again") for path in sorted(folder.glob("*.json"))}


def _read(path: Path, what: str, *, fix: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file", expected=what, fix=fix)
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})", expected=what, fix=fix) from None
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: not {what}", got=type(values).__name__, expected="an object", fix=fix)
    if what != "metrics" and (values.get("schema") != SCHEMA or not isinstance(values.get("results"), list)):
        raise InputError(
            f"{path}: not {what} of schema {SCHEMA}", got=values.get("schema"), expected="schema, results", fix=fix
        )
    return dict(values)
