"""The ladder: rungs in their order, what is missing with its reason, claims beside them and never among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hstu.artifact import encode_json
from hstu.errors import InputError
from stages.contract import Workspace
from stages.ladder import BATCH, RUNGS, climb, rungs_of
from stages.report_ladder import CLAIMS, ladder_html, ladder_table, render
from tests.stages.benchmarks import ENVIRONMENT
from tests.stages.bundles import rewrite


def row(runtime: str, backend: str, precision: str, entry: str, batch: int, ratio: float) -> dict[str, Any]:
    return {
        "runtime": runtime, "backend": backend, "precision": precision, "entry": entry, "batch": batch,
        "correct": True, "max_abs_error": 1e-7, "top10_overlap": 1.0, "latency_ms": {"p50": 10 / ratio},
        "throughput_rps": 100.0 * ratio, "peak_memory_mib": 50.0, "ratio_to_eager": ratio,
        "ratio_ci95": [ratio * 0.9, ratio * 1.1], "core_wait_share": 0.0, "rounds": 9,
    }  # fmt: skip


def rows(*without: str) -> list[dict[str, Any]]:
    found = [row("torch-eager", "torch", "fp32", "extend", batch, 1.0) for batch in (1, BATCH)]
    for height, rung in enumerate(RUNGS):
        if rung.name not in without:
            named = rung.runtime, rung.backend, rung.precision, rung.entry
            found += [row(*named, batch, 1.0 + height) for batch in (1, BATCH)]
    return found


def report(**changes: Any) -> dict[str, Any]:
    found, missing = rungs_of(changes.pop("rows", rows()), changes.pop("skipped", []))
    return {
        "case": "small", "model": "a small model", "batch": BATCH, "occupancy": 0.5, "new_events": 10,
        "environment": ENVIRONMENT, "rungs": found, "missing": missing,
    } | changes  # fmt: skip


def test_rungs_stand_in_their_order_beside_eager() -> None:
    table = ladder_table(report())
    assert [line[0] for line in table.body] == [rung.name for rung in RUNGS]
    assert table.body[0][1:8] == ["10", "+0 %", "1.00 (0.90..1.10)", "100", "+0 %", "50", "+0 %"]
    assert table.body[2][2:6] == ["−67 %", "3.00 (2.70..3.30)", "300", "+200 %"]
    assert {line[-1] for line in table.body} == {"unmeasured"}
    assert "no measurement of ours" in table.note
    assert "Nothing has been measured on a GPU" in table.note


def test_claims_stand_beside_what_was_measured_and_nowhere_else() -> None:
    claims = [line[8] for line in ladder_table(report()).body]
    assert set(claims) - {"–"} == set(CLAIMS.values())
    (vllm,) = [line for line in ladder_table(report()).body if line[0] == "vLLM, cold"]
    assert vllm[8] == "−60 % / +320 % / −40 %"


def test_what_is_not_here_is_said_with_its_reason() -> None:
    skipped = [{"runtime": "vllm", "precision": "fp32", "reason": "vllm is not installed\nTraceback"}]
    without = report(rows=rows("vLLM, cold", "vLLM, prefix cached", "bf16"), skipped=skipped)
    assert [one["rung"] for one in without["missing"]] == ["bf16", "vLLM, cold", "vLLM, prefix cached"]
    note = ladder_table(without).note
    assert "Not measured: vLLM, cold (vllm is not installed)." in note
    assert "Not measured: bf16 (not in the bundle)." in note
    with pytest.raises(InputError):
        rungs_of([], [])


def test_wrong_answers_have_no_figures() -> None:
    wrong = [one | {"latency_ms": None, "correct": False} if one["precision"] == "int8" else one for one in rows()]
    (line,) = [line for line in ladder_table(report(rows=wrong)).body if line[0] == "int8"]
    assert line[1:8] == ["wrong"] * 7
    assert "int8" in ladder_html(report(rows=wrong))


def test_a_gpu_has_a_column_of_its_own() -> None:
    step = {"name": "int8 retrieve: time", "ok": True, "found": {"users_1": {"p50_ms": 0.25}}}
    table = ladder_table(report(), [{"device": "A GPU", "steps": [step]}])
    assert table.head[-1] == "A GPU p50 ms"
    assert [line[-1] for line in table.body if line[0] == "int8"] == ["0.25"]
    assert "make gpu-check" in table.note


def test_the_page_has_a_bar_for_each_rung_or_says_how_to_get_them() -> None:
    html = ladder_html(report())
    assert html.count('<div class="bar-row">') == 2 * len(RUNGS)
    assert "python cli.py ladder" in ladder_html(None)
    assert render(report()).count("\n| ") == len(RUNGS) + 1


@pytest.mark.slow
def test_the_ladder_of_a_tiny_bundle(artifacts: Path, tmp_path: Path) -> None:
    """Really measured, without the engines that the bundle has not; vLLM among them."""
    import shutil

    from serving.vllm_plugin.tokenizer import write_tokenizer
    from tests.stages.bundles import CONFIG

    copy = Path(shutil.copytree(artifacts, tmp_path / "artifacts"))
    write_tokenizer(copy / "bundle", CONFIG)
    rewrite(copy / "bundle")
    found = climb(Workspace(artifacts=copy, reports=tmp_path, values={}), "trained", seconds=0.2)
    assert [rung["rung"] for rung in found["rungs"]] == [
        "eager", "features", "ONNX", "engine fp32", "vLLM, cold", "vLLM, prefix cached",
    ]  # fmt: skip
    assert all(rung["one_user"]["correct"] and rung["batch"]["correct"] for rung in found["rungs"])
    assert json.loads((tmp_path / "ladder.json").read_bytes()) == json.loads(encode_json(found))
