"""Trials of the gate: counted, told with their uncertainty, and continued where they were."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hstu.artifact import encode_json
from stages import gate_trials
from stages.contract import Workspace
from stages.gate import Verdict
from stages.gate_checks import Check
from tests.stages.benchmarks import PARAMS
from tests.stages.bundles import rewrite, write_artifacts


def trial(kind: str, *statuses: str) -> dict[str, Any]:
    worst = "fail" if "fail" in statuses else "inconclusive" if "inconclusive" in statuses else "pass"
    engines = {str(index): {"status": status, "got": ""} for index, status in enumerate(statuses)}
    return {"kind": kind, "status": worst, "seconds": 10.0, "engines": engines}


def test_runs_and_engines_are_counted_apart() -> None:
    equal = [trial("equal", "pass", "pass")] * 48 + [
        trial("equal", "pass", "inconclusive"),
        trial("equal", "fail", "pass"),
    ]
    slower = [trial("slower", "fail", "fail")] * 49 + [trial("slower", "pass", "inconclusive")]
    found = gate_trials.summarize([*equal, *slower])
    assert (found["equal"]["runs"], found["equal"]["fail"], found["equal"]["inconclusive"]) == (50, 1, 1)
    assert found["equal"]["failed_share"] == 0.02
    assert (found["slower"]["engines"], found["slower"]["engines_failed"]) == (100, 98)
    text = gate_trials.render({"summary": found, "slowdown": 0.1})
    assert "| a bundle beside itself | 50 | 1 (2%) | 0% to 10% | 1 | 48 | 1 of 100 | 10 s |" in text
    assert "| made 10% slower | 50 | 49 (98%) |" in text


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.0713), (1, 0.0035, 0.1050), (50, 0.9287, 1.0)])
def test_the_interval_of_a_share_is_wilsons(hits: int, low: float, high: float) -> None:
    assert gate_trials.interval(hits, 50) == pytest.approx((low, high), abs=2e-3)


def test_trials_go_on_and_are_dropped_for_another_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_artifacts(tmp_path / "artifacts")
    rewrite(bundle)
    asked: list[float] = []

    def compare(*_: object, slower: float) -> Verdict:
        asked.append(slower)
        status = "fail" if slower else "pass"
        return Verdict(checks=(Check(kind="speed", what="fp32 retrieve", status=status, got="", limit=""),))

    monkeypatch.setattr(gate_trials, "compare_bundles", compare)
    values = json.loads(encode_json(dataclasses.asdict(PARAMS)))
    workspace = Workspace(artifacts=tmp_path, reports=tmp_path / "reports", values={"gate": values})
    gate_trials.run_trials(workspace, bundle, trials=2, slowdown=0.1, minutes=1)
    assert asked == [0.0, 0.1, 0.0, 0.1]
    more = gate_trials.run_trials(workspace, bundle, trials=3, slowdown=0.1, minutes=1)
    assert len(asked) == 6
    assert more["summary"]["equal"]["pass"] == more["summary"]["slower"]["fail"] == 3
    again = gate_trials.run_trials(workspace, bundle, trials=1, slowdown=0.2, minutes=1)
    assert (asked[-1], again["summary"]["slower"]["runs"]) == (0.2, 1)
    assert "dropped" in capsys.readouterr().err
