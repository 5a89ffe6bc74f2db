"""Two bundles side by side: the same is hardly ever worse than itself, a tenth is found out, what is missing fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hstu.artifact import encode_json
from hstu.errors import UsageError
from stages.gate_bundles import QUALITY, check_quality, check_size, check_speed, compare_bundles, mean_with_margin
from stages.measure.side_by_side import Difference
from tests.stages.benchmarks import PARAMS
from tests.stages.bundles import rewrite, write_artifacts

ENGINES = 5


def drawn(rng: np.random.Generator, slower: float, *, noise: float = 0.025, openings: int = 6) -> Difference:
    """A difference as one of `noise` from opening to opening gives it."""
    logs = np.log1p(slower) + rng.normal(0.0, noise, openings)
    fixed = [0.001, -0.001, 0.0]
    return Difference(
        logs=logs.tolist(), calibration=fixed, baseline_ms=[1.0], candidate_ms=[1.0 + slower], seconds=1.0
    )


def test_the_margin_holds_the_truth_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(0)
    held = [
        abs(mean) <= margin for mean, margin in (mean_with_margin(rng.normal(0, 1, 6).tolist()) for _ in range(4000))
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_the_same_bundle_seldom_fails_against_itself_and_a_tenth_slower_is_found_out() -> None:
    """A run fails when any of its five engines does."""
    rng = np.random.default_rng(1)
    runs = 500
    same = [any(check_speed("e", drawn(rng, 0.0), 0.03).status == "fail" for _ in range(ENGINES)) for _ in range(runs)]
    slower = [check_speed("e", drawn(rng, 0.1), 0.03).status == "fail" for _ in range(runs)]
    assert np.mean(same) <= 0.02
    assert np.mean(slower) >= 0.95


def test_what_cannot_be_told_is_inconclusive() -> None:
    rng = np.random.default_rng(2)
    assert check_speed("e", drawn(rng, 0.0, noise=0.005), 0.03).status == "pass"
    assert check_speed("e", drawn(rng, 0.1, noise=0.3), 0.03).status == "inconclusive"
    busy = dataclasses.replace(drawn(rng, 0.5, noise=0.005), waited_s=1.5)
    check = check_speed("e", busy, 0.03)
    assert (check.status, "waited for cores 150%" in check.got) == ("inconclusive", True)
    lame = dataclasses.replace(drawn(rng, 0.1, noise=0.005), calibration=[0.1, 0.09, 0.11])
    check = check_speed("e", lame, 0.03)
    assert (check.status, "fixed work +10.5%" in check.got) == ("inconclusive", True)


def test_quality_and_size_are_exact() -> None:
    before = {"top10_overlap": 0.97, "hr_at_10": 0.5}
    assert [c.status for c in check_quality("int8", before, before, PARAMS)] == ["pass", "pass"]
    assert [c.status for c in check_quality("int8", before, before | {"hr_at_10": 0.4899}, PARAMS)] == ["fail", "pass"]
    assert [c.got for c in check_quality("int8", before, {"hr_at_10": 0.5}, PARAMS)] == ["0.5000", "missing"]
    assert check_quality("int8", before, {"hr_at_10": 0.5}, PARAMS)[1].status == "fail"
    assert (check_size(100, 105, 0.05).status, check_size(100, 106, 0.05).status) == ("pass", "fail")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_artifacts(tmp_path_factory.mktemp("side-by-side") / "artifacts")
    for engine in (folder / "engines").iterdir():
        (engine / QUALITY).write_bytes(encode_json({"top10_overlap": 1.0}))
    rewrite(folder)
    return folder


def test_a_bundle_beside_itself(bundle: Path) -> None:
    params = dataclasses.replace(PARAMS, openings=3, rounds=2)
    verdict = compare_bundles(bundle, bundle, params)
    kinds = [(check.kind, check.what.split()[0]) for check in verdict.checks]
    assert kinds == [
        ("size", "bundle"), ("quality", "fp32"), ("quality", "fp32-tensorrt-rtx"), ("speed", "fp32"),
    ]  # fmt: skip
    assert [check.status for check in verdict.checks if check.kind != "speed"] == ["pass"] * 3


def test_an_engine_that_is_gone_fails_and_another_model_is_refused(bundle: Path, tmp_path: Path) -> None:
    less = tmp_path / "less"
    shutil.copytree(bundle, less)
    for name in ("fp32", "fp32-tensorrt-rtx"):
        shutil.rmtree(less / "engines" / name)
    rewrite(less)
    verdict = compare_bundles(bundle, less, PARAMS)
    assert [(c.kind, c.status) for c in verdict.checks] == [
        ("size", "pass"),
        ("coverage", "fail"),
        ("coverage", "fail"),
    ]
    config = json.loads((less / "config.json").read_text())
    config["hstu"]["num_items"] += 1
    (less / "config.json").write_text(json.dumps(config))
    rewrite(less)
    with pytest.raises(UsageError, match="different shapes"):
        compare_bundles(bundle, less, PARAMS)
