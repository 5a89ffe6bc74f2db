"""The gate: what is worse fails, what is noise does not, what cannot be judged is said to be so."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.artifact import encode_json
from hstu.errors import InputError, ParameterError, UsageError
from stages.contract import Workspace
from stages.gate import GateParams, Verdict, accept_baseline, check, run_gate
from stages.gate_checks import compare_results
from tests.stages.benchmarks import METRICS, PARAMS, RUNTIMES, benchmark, noisy, scaled, write

Report = dict[str, Any]


def compare(now: Report, before: Report | None = None, *, params: GateParams = PARAMS) -> Verdict:
    return Verdict(checks=tuple(compare_results(now, benchmark() if before is None else before, params)))


def failing(verdict: Verdict) -> list[str]:
    return [f"{c.kind}: {c.what}" for c in verdict.checks if c.status == "fail"]


def engine(report: Report, precision: str = "int8", batch: int = 32) -> dict[str, Any]:
    """The row of an engine on all threads."""
    wanted = ("engine", precision, batch, "all")
    rows = [r for r in report["results"] if (r["runtime"], r["precision"], r["batch"], r["thread_mode"]) == wanted]
    assert len(rows) == 1
    return rows[0]  # type: ignore[no-any-return]


def test_the_same_run_passes() -> None:
    verdict = compare(benchmark())
    assert verdict.status == "pass"
    assert verdict.count("pass") == 4 * 4 * 4 + 3 * 4 + 3  # correct, overlap, error, memory; speed of rows and groups


def test_a_runtime_that_became_slower_fails() -> None:
    verdict = compare(scaled(benchmark(), lambda row: 1 / 1.5 if row["precision"] == "int8" else 1.0))
    assert verdict.status == "fail"
    assert "speed of all: trained engine onnxruntime int8, 4 rows" in failing(verdict)
    assert not any("fp32" in name for name in failing(verdict))


def test_noise_between_runs_does_not_fail_and_a_real_slowdown_does() -> None:
    rng, runs = np.random.default_rng(3), 200
    same = sum(not compare(noisy(benchmark(), rng, 0.05)).passed for _ in range(runs))
    slower = scaled(benchmark(), lambda row: 1 / 1.5 if row["runtime"] == "engine" else 1.0)
    caught = sum(not compare(noisy(slower, rng, 0.05)).passed for _ in range(runs))
    assert same <= 0.02 * runs
    assert caught >= 0.99 * runs


def test_one_slow_cell_is_found_among_good_ones() -> None:
    def factor(row: dict[str, Any]) -> float:
        return 0.55 if (row["precision"], row["batch"]) == ("int8", 32) else 1.0

    assert failing(compare(scaled(benchmark(), factor))) == [
        "speed: trained retrieve engine onnxruntime int8 B=32 100% all threads"
    ]


def test_a_wide_interval_is_inconclusive() -> None:
    now = scaled(benchmark(), lambda row: 0.7 if row["runtime"] == "engine" else 1.0)
    for row in now["results"]:
        row["ratio_ci95"] = [row["ratio_to_eager"] * 0.4, row["ratio_to_eager"] * 2.5]
    verdict = compare(now)
    assert verdict.status == "inconclusive"
    assert verdict.passed


def test_speed_is_not_judged_while_other_work_had_the_cores() -> None:
    slower = scaled(benchmark(), lambda row: 1 / 1.5 if row["runtime"] == "engine" else 1.0)
    for row in slower["results"]:
        row["core_wait_share"] = 0.3
    verdict = compare(slower)
    assert verdict.status == "inconclusive"
    assert any("other work had the cores now" in check.got for check in verdict.checks)
    for row in slower["results"]:
        row["core_wait_share"] = 0.05
    assert compare(slower).status == "fail"


def test_a_peer_that_answers_wrongly_only_informs() -> None:
    report = benchmark()
    for row in report["results"]:
        if row["runtime"] == "onnx-plain":
            row.update(correct=False, max_abs_error=0.5, top10_overlap=0.1)
    verdict = compare(report)
    assert verdict.status == "pass"
    assert {c.kind for c in verdict.checks if c.status == "info"} >= {"correct", "error", "overlap"}


def test_a_slower_peer_only_informs() -> None:
    verdict = compare(scaled(benchmark(), lambda row: 0.5 if row["runtime"] == "onnx-plain" else 1.0))
    assert verdict.status == "pass"
    assert any(c.status == "info" and "onnx-plain" in c.what and "x eager" in c.got for c in verdict.checks)


def drop_row(report: Report) -> None:
    report["results"].remove(engine(report))


def drop_overlap(report: Report) -> None:
    engine(report)["top10_overlap"] = 0.9


def grow_error(report: Report) -> None:
    engine(report)["max_abs_error"] = 0.05


def grow_memory(report: Report) -> None:
    engine(report)["peak_memory_mib"] = 200.0


def make_wrong(report: Report) -> None:
    engine(report).update(correct=False, latency_ms=None, throughput_rps=None, ratio_to_eager=None)


def lose_latency(report: Report) -> None:
    engine(report)["latency_ms"] = None


def lose_field(report: Report) -> None:
    del engine(report)["peak_memory_mib"]


@pytest.mark.parametrize(
    ("harm", "kinds"),
    [
        (drop_row, {"coverage"}),
        (drop_overlap, {"overlap"}),
        (grow_error, {"error"}),
        (grow_memory, {"memory"}),
        (make_wrong, {"correct", "coverage"}),
        (lose_latency, {"coverage"}),
        (lose_field, {"coverage"}),
    ],
)
def test_every_kind_of_harm_fails(harm: Callable[[Report], None], kinds: set[str]) -> None:
    now = benchmark()
    harm(now)
    verdict = compare(now)
    assert {c.kind for c in verdict.checks if c.status == "fail"} == kinds
    assert all("int8" in c.what for c in verdict.checks if c.status == "fail")


def test_a_missing_row_says_why_it_was_skipped() -> None:
    now = benchmark()
    drop_row(now)
    now["skipped"] = [
        {"case": "trained", "runtime": "engine", "precision": "int8", "reason": "refused: overlap 0.7\nmore"}
    ]
    (missing,) = [c for c in compare(now).checks if c.status == "fail"]
    assert missing.got == "missing (refused: overlap 0.7)"


def test_a_case_that_the_baseline_lacks_fails() -> None:
    params = GateParams(**{name: getattr(PARAMS, name) for name in PARAMS.__slots__} | {"cases": ("trained", "small")})
    assert failing(compare(benchmark(), params=params)) == ["coverage: small"]


def test_cases_that_the_gate_is_not_asked_about_do_not_matter() -> None:
    before = benchmark()
    before["results"] += [row | {"case": "reference-512"} for row in before["results"]]
    assert compare(benchmark(), before).status == "pass"


def test_another_processor_leaves_doubt_and_a_lost_instruction_set_more() -> None:
    slower = scaled(benchmark(), lambda row: 1 / 1.5 if row["runtime"] == "engine" else 1.0)
    slower["environment"]["cpu_model"] = "Another CPU"
    assert compare(slower).status == "inconclusive"
    much = scaled(benchmark(), lambda row: 0.2 if row["precision"] == "int8" else 1.0)
    much["environment"] |= {"cpu_model": "Another CPU", "instruction_sets": ["avx2"]}
    verdict = compare(much)
    assert verdict.status == "inconclusive"
    assert any("this CPU lacks avx512_bf16, avx512f" in check.got for check in verdict.checks)
    much["environment"]["instruction_sets"] = benchmark()["environment"]["instruction_sets"]
    assert compare(much).status == "fail"


def test_another_number_of_cores_judges_one_thread_alone() -> None:
    now = scaled(benchmark(), lambda row: 0.3 if row["thread_mode"] == "all" else 1.0)
    now["environment"]["cores"] = 64
    verdict = compare(now)
    assert verdict.passed
    assert any("another number of cores" in check.got for check in verdict.checks)
    slow = scaled(now, lambda row: 0.2 if row["thread_mode"] == "one" and row["runtime"] == "engine" else 1.0)
    assert not compare(slow).passed


def test_latencies_inform_on_the_same_machine_alone() -> None:
    kind = "p50 on this machine"
    assert sum(check.kind == kind for check in compare(benchmark()).checks) == len(RUNTIMES)
    other = benchmark()
    other["environment"]["cpu_model"] = "Another CPU"
    assert not any(check.kind == kind for check in compare(other).checks)


def test_rows_with_only_the_documented_fields_can_be_compared() -> None:
    fields = (
        "case", "entry", "runtime", "backend", "precision", "batch", "length", "latency_ms", "throughput_rps",
        "peak_memory_mib", "ratio_to_eager", "correct", "max_abs_error", "top10_overlap",
    )  # fmt: skip
    report = benchmark()
    report["results"] = [{name: row[name] for name in fields} for row in report["results"] if row["batch"] != 1]
    assert compare(copy.deepcopy(report), report).status == "pass"


# ── files ──


@pytest.fixture
def accepted(tmp_path: Path) -> tuple[Path, Path]:
    """(benchmark.json, baseline.json) of the same run."""
    path = write(tmp_path, benchmark())
    accept_baseline(path, tmp_path / "baseline.json", PARAMS, reason="the first")
    return path, tmp_path / "baseline.json"


def test_an_accepted_baseline_holds_the_reason_and_passes(accepted: tuple[Path, Path]) -> None:
    verdict = check(*accepted, PARAMS)
    assert verdict.status == "pass"
    assert json.loads(accepted[1].read_text())["reason"] == "the first"
    quality = sorted(c.what for c in verdict.checks if c.kind == "quality")
    assert quality == [
        "build-engine-int8/embedding_cosine/mean",
        "build-engine-int8/embedding_cosine/min",
        "build-engine-int8/hr_at_10/engine",
        "build-engine-int8/top10_overlap",
        "checkpoint/auc_engagement",
        "checkpoint/hr_at_10",
        "checkpoint/ndcg_at_10",
    ]


def test_quality_that_dropped_or_is_missing_fails(accepted: tuple[Path, Path]) -> None:
    metrics = copy.deepcopy(METRICS)
    metrics["checkpoint"]["hr_at_10"] = 0.47
    del metrics["build-engine-int8"]["hr_at_10"]
    write(accepted[0].parent, benchmark(), metrics)
    assert failing(check(*accepted, PARAMS)) == [
        "quality: build-engine-int8/hr_at_10/engine",
        "quality: checkpoint/hr_at_10",
    ]
    (accepted[0].parent / "metrics" / "checkpoint.json").unlink()
    assert "quality: checkpoint/auc_engagement" in failing(check(*accepted, PARAMS))


def test_a_bare_benchmark_can_be_the_baseline(tmp_path: Path) -> None:
    path = write(tmp_path, benchmark())
    (tmp_path / "baseline.json").write_bytes(path.read_bytes())
    verdict = check(path, tmp_path / "baseline.json", PARAMS)
    assert verdict.status == "pass"
    assert "holds no metrics" in verdict.note


def workspace(tmp_path: Path, **changes: Any) -> Workspace:
    values = {name: getattr(PARAMS, name) for name in PARAMS.__slots__} | changes
    return Workspace(artifacts=tmp_path / "artifacts", reports=tmp_path, values={"gate": values})


def test_run_gate_accepts_with_a_reason_only_and_then_passes(tmp_path: Path) -> None:
    write(tmp_path, benchmark())
    with pytest.raises(UsageError, match="for a reason"):
        run_gate(workspace(tmp_path), accept=True)
    with pytest.raises(UsageError, match="--reason belongs to --accept"):
        run_gate(workspace(tmp_path), reason="why")
    with pytest.raises(InputError, match=r"(?s)baseline.json: there is no such file.*gate --accept --reason"):
        run_gate(workspace(tmp_path))
    assert not (tmp_path / "baseline.json").exists()
    verdict = run_gate(workspace(tmp_path), accept=True, reason=" the first ")
    assert verdict.passed
    assert "the first" in verdict.text
    assert run_gate(workspace(tmp_path)).passed


def test_a_disturbed_run_cannot_become_the_baseline(tmp_path: Path) -> None:
    report = benchmark()
    for row in report["results"][:9]:
        row["core_wait_share"] = 0.5
    write(tmp_path, report)
    with pytest.raises(UsageError, match="9 of 16 results waited for a core more than 10%"):
        run_gate(workspace(tmp_path), accept=True, reason="in haste")
    report["results"][0]["core_wait_share"] = 0.01
    write(tmp_path, report)
    assert run_gate(workspace(tmp_path), accept=True, reason="half of them").passed


@pytest.mark.parametrize("harm", [make_wrong, lambda report: report["results"].clear()])
def test_what_is_wrong_or_missing_cannot_become_the_baseline(tmp_path: Path, harm: Callable[[Report], None]) -> None:
    report = benchmark()
    harm(report)
    write(tmp_path, report)
    with pytest.raises(UsageError, match="cannot become the baseline"):
        run_gate(workspace(tmp_path), accept=True, reason="why not")
    assert not (tmp_path / "baseline.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not a benchmark"),
        (encode_json({"schema": 2, "results": []}), "of schema 1"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_an_unreadable_benchmark_is_an_input_error(
    tmp_path: Path, accepted: tuple[Path, Path], content: bytes, message: str
) -> None:
    accepted[0].write_bytes(content)
    with pytest.raises(InputError, match=message):
        check(*accepted, PARAMS)


def test_parameters_out_of_range_are_refused(tmp_path: Path) -> None:
    write(tmp_path, benchmark())
    for changes in ({"cases": []}, {"max_slowdown": 0.0}, {"run_noise": -0.1}, {"max_error_growth": 0.5}):
        with pytest.raises(ParameterError):
            run_gate(workspace(tmp_path, **changes), accept=True, reason="no matter")


def test_the_table_names_failures_first_and_counts_the_rest() -> None:
    now = benchmark()
    make_wrong(now)
    lines = compare(now).text.splitlines()
    assert lines[1].startswith("fail")
    assert lines[-1].startswith("fail: ")
    assert "2 fail" in lines[-1]
    assert any("int8, 3 rows" in line and "3.50x eager" in line for line in lines)
