"""Two bundles against each other on this machine: speed side by side, quality and size to the last digit.

The gate of two files (`stages.gate`) compares runs of different days; here both bundles run at the same time, so an
engine that is a tenth slower is found out where that one must allow for a fifth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hstu.artifact import Artifact, open_artifact
from hstu.config import HSTUConfig
from hstu.errors import UsageError
from serving.engine import read_spec
from stages.contract import Workspace, say
from stages.gate import GateParams, Verdict
from stages.gate_checks import Check, Status
from stages.parameters import load_params

if TYPE_CHECKING:
    from stages.measure.contestants import Contestant
    from stages.measure.side_by_side import Difference

QUALITY = "quality.json"  # of an engine: the figures of its gate
MAX_WAIT = (
    1.0  # time that a pair may have waited for cores, over all its time: no part of the figures, but it stirs caches
)
MORE = 2  # times that an engine in doubt is measured again; all its openings count
# Student's t, 95 % two-sided, by degrees of freedom: a handful of openings is a small sample.
T975 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201, 15: 2.131, 17: 2.110,
        23: 2.069, 29: 2.045}  # fmt: skip


def gate_against(workspace: Workspace, baseline: Path) -> Verdict:
    """The workspace's bundle against another, with the parameters of section `gate`."""
    params = load_params(GateParams, workspace.values.get("gate", {}), section="gate")
    return compare_bundles(baseline, workspace.artifacts / "bundle", params)


def compare_bundles(baseline: Path, candidate: Path, params: GateParams, *, slower: float = 0.0) -> Verdict:
    """Every engine of the baseline against the candidate's of the same name.

    Raises UsageError when the models are of different shapes. `slower` see `measure_difference`.
    """
    before, now = (open_artifact(path, stage="bundle") for path in (baseline, candidate))
    config = HSTUConfig.from_pretrained(before.path)
    if HSTUConfig.from_pretrained(now.path) != config:
        raise UsageError(
            "the bundles hold models of different shapes: their speeds do not compare",
            got=str(candidate),
            expected=str(baseline),
        )
    checks = [check_size(_bytes(before), _bytes(now), params.max_size_growth)]
    timed = []
    for name in _engines(before):
        folders = (before.path / "engines" / name, now.path / "engines" / name)
        if not folders[1].is_dir():
            checks.append(Check(kind="coverage", what=name, status="fail", got="missing", limit="present"))
            continue
        figures = [json.loads((folder / QUALITY).read_text()) for folder in folders]
        checks += check_quality(name, figures[0], figures[1], params)
        executed = [read_spec(folder).executed for folder in folders]
        if executed == [True, False]:
            checks.append(Check(kind="coverage", what=name, status="fail", got="only built", limit="runs here"))
        elif executed[0]:
            timed.append((name, *folders))
    return Verdict(checks=(*checks, *_speeds(timed, config, params, slower)))


def check_size(before: int, now: int, max_growth: float) -> Check:
    """The bytes of the whole bundle."""
    limit = before * (1 + max_growth)
    return Check(
        kind="size",
        what="bundle",
        status="pass" if now <= limit else "fail",
        got=f"{now / 2**20:.2f} MiB",
        limit=f"<= {limit / 2**20:.2f} MiB",
    )


def check_quality(name: str, before: dict[str, float], now: dict[str, float], params: GateParams) -> list[Check]:
    """The figures of the engine's own gate; one that is missing fails."""
    checks = []
    for figure, old in sorted(before.items()):
        new, limit = now.get(figure), old - params.max_quality_drop
        status: Status = "pass" if new is not None and new >= limit else "fail"
        got = "missing" if new is None else f"{new:.4f}"
        checks.append(Check(kind="quality", what=f"{name} {figure}", status=status, got=got, limit=f">= {limit:.4f}"))
    return checks


def check_speed(name: str, difference: Difference, noticed: float) -> Check:
    """Slower beyond doubt by more than `noticed` fails; surely not slower by twice that passes; else inconclusive.

    Where fixed work differs between the two processes by as much as `noticed`, or they waited for cores most of the
    time, nothing is said.
    """
    mean, margin = mean_with_margin(difference.logs)
    noise, doubt = mean_with_margin(difference.calibration)
    disturbed = difference.wait_share > MAX_WAIT or abs(noise) > math.log1p(noticed)
    status: Status = "inconclusive"
    if not disturbed and mean - margin > math.log1p(noticed):
        status = "fail"
    elif not disturbed and mean + margin < math.log1p(2 * noticed):
        status = "pass"
    times = f"{np.median(difference.candidate_ms):.4g} ms beside {np.median(difference.baseline_ms):.4g}"
    fixed = f"; fixed work {math.expm1(noise):+.1%} ± {math.expm1(doubt):.1%}"
    busy = f", waited for cores {difference.wait_share:.0%} of the time" if disturbed else ""
    return Check(
        kind="speed",
        what=name,
        status=status,
        got=f"{times}: {math.expm1(mean):+.1%} ± {math.expm1(margin):.1%}{fixed}{busy}",
        limit=f"<= {noticed:+.0%}",
    )


def mean_with_margin(logs: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % confidence interval (Student's t)."""
    count = len(logs)
    quantile = T975[max(df for df in T975 if df <= count - 1)]
    return float(np.mean(logs)), quantile * float(np.std(logs, ddof=1)) / math.sqrt(count)


def _speeds(
    timed: Sequence[tuple[str, Path, Path]], config: HSTUConfig, params: GateParams, slower: float
) -> list[Check]:
    """The speed of each engine, by name and the two folders it stands in; one process for each bundle."""
    from stages.measure.cases import Cell
    from stages.measure.side_by_side import both_sides, measure_difference

    checks: list[Check] = []
    if not timed:
        return checks
    cell = Cell(case="trained", entry="retrieve", batch=1, length=config.max_history, occupancy=1.0, thread_mode="one")
    sides = {name: (_contestant(before), _contestant(now)) for name, before, now in timed}
    with both_sides(*next(iter(sides.values()))) as workers:
        for name, (before, now) in sides.items():
            measure = partial(
                measure_difference, workers, before, now, config, cell,
                openings=params.openings, rounds=params.rounds, slower=slower,
            )  # fmt: skip
            what = f"{name} retrieve, one user, one thread"
            difference = measure(seed=0)
            check = check_speed(what, difference, params.noticed_slowdown)
            for seed in range(1, 1 + MORE):
                if check.status != "inconclusive":
                    break
                difference += measure(seed=seed)
                check = check_speed(what, difference, params.noticed_slowdown)
            say(f"gate: {check.what}: {check.status}, {check.got}")
            checks.append(check)
    return checks


def _contestant(folder: Path) -> Contestant:
    from stages.measure.contestants import Contestant

    spec = read_spec(folder)
    return Contestant(
        runtime="engine", backend=spec.backend, precision=spec.precision, folder=folder, checkpoint=folder.parents[1]
    )


def _engines(bundle: Artifact) -> list[str]:
    files = bundle.manifest["files"]
    return sorted({name.split("/")[1] for name in files if name.startswith("engines/")})


def _bytes(bundle: Artifact) -> int:
    return sum(entry["bytes"] for entry in bundle.manifest["files"].values())
