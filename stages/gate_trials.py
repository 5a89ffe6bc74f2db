"""How far the gate of two bundles can be believed: a bundle beside itself, as it is and made slower, many times.

Every trial is a whole run of `gate --against`, with processes and engines of its own.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hstu.artifact import open_artifact
from stages.contract import Workspace, say, write_report
from stages.gate import GateParams, Verdict
from stages.gate_bundles import compare_bundles
from stages.parameters import load_params

FILE = "gate-trials.json"
SCHEMA = 1
SETTING = ("openings", "rounds", "noticed_slowdown")  # of the gate's parameters: what the trials depend on
Z95 = 1.96
Kind = Literal["equal", "slower"]


def run_trials(workspace: Workspace, bundle: Path, *, trials: int, slowdown: float, minutes: float) -> dict[str, Any]:
    """`reports/gate-trials.json` has up to `trials` of each kind, as many more as `minutes` allow; what it says.

    Trials that it has of the same bundle, machine and parameters stay; others are dropped.
    """
    from stages.measure.environment import describe_environment

    params = load_params(GateParams, workspace.values.get("gate", {}), section="gate")
    path = workspace.reports / FILE
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "bundle": open_artifact(bundle, stage="bundle").id,
        "environment": describe_environment(),
        "params": {name: getattr(params, name) for name in SETTING},
        "slowdown": slowdown,
    }
    before = json.loads(path.read_bytes()) if path.is_file() else {}
    found: list[dict[str, Any]] = []
    if all(before.get(name) == value for name, value in report.items()):
        found = list(before["trials"])
    elif before:
        say(f"gate-trials: {path} is of another bundle, machine or setting; its trials are dropped")
    deadline = time.monotonic() + 60 * minutes
    kinds: tuple[Kind, ...] = ("equal", "slower")
    while time.monotonic() < deadline:
        done = {kind: sum(trial["kind"] == kind for trial in found) for kind in kinds}
        kind = min(kinds, key=lambda kind: done[kind])
        if done[kind] >= trials:
            break
        started = time.monotonic()
        verdict = compare_bundles(bundle, bundle, params, slower=slowdown if kind == "slower" else 0.0)
        found.append(_trial(kind, verdict, time.monotonic() - started))
        say(f"gate-trials: {kind} {done[kind] + 1} of {trials}: {verdict.status}")
        write_report(path, report | {"trials": found, "summary": summarize(found)})
    return report | {"trials": found, "summary": summarize(found)}


def _trial(kind: Kind, verdict: Verdict, seconds: float) -> dict[str, Any]:
    engines = {check.what.split()[0]: check for check in verdict.checks if check.kind == "speed"}
    return {
        "kind": kind,
        "status": verdict.status,
        "seconds": round(seconds, 1),
        "engines": {name: {"status": check.status, "got": check.got} for name, check in engines.items()},
    }


def summarize(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each kind: how many runs failed, passed and were inconclusive, with the 95 % interval of the failing share,
    how many single engines failed, and how long a run took."""
    summary = {}
    for kind in ("equal", "slower"):
        runs = [trial for trial in trials if trial["kind"] == kind]
        if runs:
            engines = [engine["status"] for run in runs for engine in run["engines"].values()]
            statuses = [run["status"] for run in runs]
            counts = {status: statuses.count(status) for status in ("fail", "inconclusive", "pass")}
            summary[kind] = {
                "runs": len(runs),
                **counts,
                "failed_share": round(counts["fail"] / len(runs), 4),
                "failed_share_ci95": [round(value, 4) for value in interval(counts["fail"], len(runs))],
                "engines": len(engines),
                "engines_failed": engines.count("fail"),
                "engines_inconclusive": engines.count("inconclusive"),
                "median_seconds": sorted(run["seconds"] for run in runs)[len(runs) // 2],
            }
    return summary


def interval(hits: int, count: int) -> tuple[float, float]:
    """95 % of a share (E. B. Wilson, JASA 22, 1927): right for shares near 0 and 1 of few runs, too."""
    share, z2 = hits / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def render(report: Mapping[str, Any]) -> str:
    """The summary as a table in Markdown, as it stands in docs/PERFORMANCE.md."""
    names = {"equal": "a bundle beside itself", "slower": f"made {report['slowdown']:.0%} slower"}
    lines = [
        "| | runs | fail | 95 % interval | inconclusive | pass | engines that fail | a run takes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, found in report["summary"].items():
        low, high = found["failed_share_ci95"]
        cells = [
            names[kind],
            str(found["runs"]),
            f"{found['fail']} ({found['failed_share']:.0%})",
            f"{low:.0%} to {high:.0%}",
            str(found["inconclusive"]),
            str(found["pass"]),
            f"{found['engines_failed']} of {found['engines']}",
            f"{found['median_seconds']:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
