"""The ladder as a table, for the page and for Markdown, and as a chart; beside it what others only claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from stages.charts import Bar, bar_chart, table
from stages.gate_checks import is_disturbed
from stages.report_tables import Table

# The reference project's own words about an A100, relative to PyTorch: latency, throughput, memory. Nobody has
# measured them here.
CLAIMS: Mapping[str, str] = {
    "features": "−15 % / +20 % / −10 %",
    "ONNX": "−25 % / +35 % / −15 %",
    "engine": "−45 % / +180 % / −30 %",
    "vLLM": "−60 % / +320 % / −40 %",
    "custom kernels": "−70 % / +380 % / −50 %",
    "cache": "latency −90 %",
}
TONES = {"torch": "eager", "vllm": "vllm"}
BY_PRECISION = {"fp32": "ours-0", "bf16": "ours-1", "int8": "ours-2", "fp16": "ours-3"}


def ladder_table(report: Mapping[str, Any], gpus: Sequence[Mapping[str, Any]] = ()) -> Table:
    """A row for each rung: latency, throughput and memory beside eager PyTorch, the claim, and a GPU's figure."""
    head = (
        "rung", "p50 ms", "latency", "× eager", "users/s", "throughput", "MiB", "memory", "claimed (A100)",
        *(f"{gpu['device']} p50 ms" for gpu in gpus), *(() if gpus else ("GPU",)),
    )  # fmt: skip
    body = []
    for rung in report["rungs"]:
        one, many = rung["one_user"], rung["batch"]
        if one["latency_ms"] is None or many["latency_ms"] is None:
            body.append([rung["rung"], *["wrong" if not one["correct"] else "–"] * 7, _claim(rung), *_gpus(rung, gpus)])
            continue
        low, high = one["ratio_ci95"]
        mark = "\N{NO-BREAK SPACE}~" if is_disturbed(one) or is_disturbed(many) else ""
        body.append(
            [
                rung["rung"] + mark,
                f"{one['latency_ms']['p50']:.3g}",
                _change(1 / one["ratio_to_eager"]),
                f"{one['ratio_to_eager']:.2f} ({low:.2f}..{high:.2f})",
                f"{many['throughput_rps']:,.0f}",
                _change(many["ratio_to_eager"]),
                f"{many['peak_memory_mib']:,.0f}",
                "–" if rung["memory_to_eager"] is None else _change(rung["memory_to_eager"]),
                _claim(rung),
                *_gpus(rung, gpus),
            ]
        )
    missing = "".join(f" Not measured: {one['rung']} ({one['reason']})." for one in report["missing"])
    machine, share = report["environment"]["cpu_model"], f"{report['occupancy']:.0%}"
    note = (
        f"{report['model']}; {machine}, one thread, one interleaved run, answers checked first. Latency: one user, "
        f"full history. Throughput and memory: {report['batch']} users, {share} of the positions real. Changes are "
        "relative to eager PyTorch in the same rounds; who comes back stands beside eager PyTorch computing the whole "
        f"history.{missing} Claimed: what the reference project says of itself on an A100 (latency / "
        "throughput / memory against PyTorch): another model on another machine, and no measurement of ours."
    )
    if not gpus:
        note += " Nothing has been measured on a GPU."
    else:
        note += " GPU figures are of the bundle's own model (`make gpu-check`)."
    return Table(head=head, body=body, note=note)


def ladder_html(report: Mapping[str, Any] | None, gpus: Sequence[Mapping[str, Any]] = ()) -> str:
    """The chart and the table; how to get them when they are not there."""
    if report is None:
        return "<p>Not climbed yet: <code>python cli.py ladder</code> measures it.</p>"
    found = ladder_table(report, gpus)
    timed = [rung for rung in report["rungs"] if rung["one_user"]["latency_ms"] and rung["batch"]["latency_ms"]]
    charts = [
        bar_chart(title, [_bar(rung, rung[key]["ratio_to_eager"]) for rung in timed], caption="Eager PyTorch is 1.")
        for title, key in (
            ("Times as fast for one user", "one_user"),
            (f"Times the throughput, {report['batch']} users", "batch"),
        )
    ]
    note = f'<p class="caption">{escape(found.note)}</p>'
    what = "".join(f"<dt>{escape(rung['rung'])}</dt><dd>{escape(rung['summary'])}</dd>" for rung in report["rungs"])
    told = f'<details><summary>What each rung is</summary><dl class="facts">{what}</dl></details>'
    return f'<div class="charts">{"".join(charts)}</div>{table(found.head, found.body)}{note}{told}'


def render(report: Mapping[str, Any]) -> str:
    """The table as plain Markdown."""
    found = ladder_table(report)
    what = "\n".join(f"- *{rung['rung']}*: {rung['summary']}" for rung in report["rungs"])
    lines = [found.head, ["---"] + ["---:"] * (len(found.head) - 1), *found.body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{found.note}\n\n{what}"


def _bar(rung: Mapping[str, Any], value: float) -> Bar:
    tone = TONES.get(rung["backend"]) or (
        "peer" if rung["runtime"] == "onnx-plain" else BY_PRECISION[rung["precision"]]
    )
    return Bar(label=rung["rung"], value=value, text=f"{value:.2f}×", tone=tone)


def _change(factor: float) -> str:
    """0.4 → −60 %."""
    return f"{100 * (factor - 1):+,.0f} %".replace("-", "−")


def _claim(rung: Mapping[str, Any]) -> str:
    return CLAIMS[rung["claim"]] if rung["claim"] else "–"


def _gpus(rung: Mapping[str, Any], gpus: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each GPU's report says of an engine of this precision; without any report: unmeasured."""
    if not gpus:
        return ["unmeasured"]
    name = f"{rung['precision']} {rung['entry']}: time"
    cells = []
    for gpu in gpus:
        steps = [s for s in gpu["steps"] if rung["runtime"] == "engine" and s["name"] == name and s["ok"]]
        cells.append(f"{steps[0]['found']['users_1']['p50_ms']:.3g}" if steps else "unmeasured")
    return cells
