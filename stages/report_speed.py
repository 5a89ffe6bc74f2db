"""The report's chapter on speed and memory, and how a runtime is called and coloured everywhere in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from stages.charts import Bar, bar_chart, milliseconds, table
from stages.measure.cases import CASES
from stages.report_evidence import Evidence, Row
from stages.report_tables import Table, batches, label, one_user, order, ratio, returning

TONES = {"fp32": "ours-0", "bf16": "ours-1", "int8": "ours-2", "fp16": "ours-3"}
ENTRIES = {
    "retrieve": "Retrieve: a history in, the top 100 of the whole corpus out",
    "rank": "Rank: a history and its candidates in, a score per task out",
    "generate": "Generate: a slate of 10 items, one after the other",
    "extend": "Extend: a user comes back; engines have the state of the visit before, the others compute all anew",
}


def speed(evidence: Evidence) -> str:
    """Latency, throughput and memory of every runtime, case by case."""
    parts = []
    cases = evidence.benchmark["cases"]
    for case in sorted(cases, key=[case.name for case in CASES].index):
        about = cases[case]
        rows = [row for row in evidence.rows if row["case"] == case]
        parts.append(f"<h3>{escape(case)}: {escape(about['summary'])}</h3>")
        scaling = [row for row in evidence.benchmark.get("scaling", []) if row["case"] == case]
        parts += [html_table(found) for found in (one_user(rows, scaling), returning(rows)) if found]
        found = batches(rows)
        if found:
            parts.append(f"<details><summary>Batches, full and partly full</summary>{html_table(found)}</details>")
        for entry, title in ENTRIES.items():
            charts = _entry_charts([row for row in rows if row["entry"] == entry])
            if charts:
                parts.append(f'<p class="soft">{escape(title)}</p><div class="charts">{charts}</div>')
        if about.get("left_out"):
            parts.append(f'<p class="caption">Left out: {escape(about["left_out"])}</p>')
        parts.append(
            f"<details><summary>All {len(rows)} results of {escape(case)}</summary>{_all_rows(rows)}</details>"
        )
    return "".join(parts)


def html_table(found: Table) -> str:
    """The table, and its note below it."""
    note = f'<p class="caption">{escape(found.note)}</p>' if found.note else ""
    return table(found.head, found.body) + note


def _entry_charts(rows: Sequence[Row]) -> str:
    full = [row for row in rows if row["occupancy"] == 1.0 and row["latency_ms"] is not None]
    charts = []
    newest = max((row.get("new_events", 0) for row in full), default=0)  # of returning users the chart shows one kind
    full = [row for row in full if row.get("new_events", 0) == newest]
    for mode, words in (("one", "one thread"), ("all", "all threads")):
        single = sorted((r for r in full if r["batch"] == 1 and r["thread_mode"] == mode), key=order)
        if single:
            bars = [
                Bar(label=label(row), value=row["latency_ms"]["p50"], whisker=row["latency_ms"]["p95"],
                    dot=row["latency_ms"]["p99"], text=milliseconds(row["latency_ms"]["p50"]), note=ratio(row),
                    tone=_tone(row))
                for row in single
            ]  # fmt: skip
            caption = "Median; the line reaches to p95, the dot is p99."
            charts.append(bar_chart(f"Latency, one user, {words}", bars, caption=caption))
        shares = [row for row in single if row["share_of_ceiling"] is not None and row["share_of_ceiling"] <= 1]
        if shares and mode == "one":
            bars = [
                Bar(label=label(row), value=row["share_of_ceiling"], text=f"{row['share_of_ceiling']:.0%}",
                    tone=_tone(row))
                for row in shares
            ]  # fmt: skip
            caption = "The fastest matrix product of that precision, in the same rounds, is 100 %."
            charts.append(bar_chart(f"Share of the ceiling, one user, {words}", bars, caption=caption))
    largest = max((row["batch"] for row in full if row["thread_mode"] == "all"), default=1)
    many = sorted((r for r in full if r["batch"] == largest and r["thread_mode"] == "all"), key=order)
    if largest > 1:
        bars = [
            Bar(label=label(row), value=row["throughput_rps"], text=f"{row['throughput_rps']:,.0f}/s",
                note=ratio(row), tone=_tone(row))
            for row in many
        ]  # fmt: skip
        charts.append(bar_chart(f"Users a second, batches of {largest}, all threads", bars, caption="More is better."))
        bars = [
            Bar(label=label(row), value=row["peak_memory_mib"], text=f"{row['peak_memory_mib']:,.0f} MiB",
                tone=_tone(row))
            for row in many
        ]  # fmt: skip
        caption = "Peak of the runtime's own process, less what its libraries take before a model is loaded."
        charts.append(bar_chart(f"Memory, batches of {largest}", bars, caption=caption))
    return "".join(charts)


def _all_rows(rows: Sequence[Row]) -> str:
    head = (
        "entry", "runtime", "batch", "full", "threads", "p50 ms", "p95 ms", "p99 ms", "users/s", "× eager",
        "95 % interval", "of ceiling", "MiB", "max error", "top-10", "requests",
    )  # fmt: skip
    body = []
    for row in sorted(
        rows, key=lambda r: (list(ENTRIES).index(r["entry"]), r["threads"], r["batch"], -r["occupancy"], *order(r))
    ):
        latency, interval, share = row["latency_ms"], row["ratio_ci95"], row["share_of_ceiling"]
        timed = latency is not None
        body.append(
            [
                row["entry"] + (f" {row.get('new_events', 0)} new" if row.get("new_events", 0) else ""), label(row),
                str(row["batch"]), f"{row['occupancy']:.0%}", str(row["threads"]),
                *(f"{latency[name]:.4g}" if timed else "wrong" for name in ("p50", "p95", "p99")),
                f"{row['throughput_rps']:,.1f}" if timed else "–",
                ratio(row) or "1" if timed else "–",
                f"{interval[0]:.2f}–{interval[1]:.2f}" if interval else "–",
                f"{share:.0%}" if share is not None else "–",
                f"{row['peak_memory_mib']:,.0f}" if timed else "–",
                f"{row['max_abs_error']:.1e}",
                "–" if row["top10_overlap"] is None else f"{row['top10_overlap']:.3f}",
                str(row["requests"]),
            ]
        )  # fmt: skip
    return table(head, body, numeric_from=2)


def fastest(rows: Sequence[Row], case: str, *, batch: int) -> Row | None:
    """The engine that retrieves for full histories of a case in the least time, on however many threads."""
    wanted = {"case": case, "entry": "retrieve", "batch": batch, "occupancy": 1.0, "runtime": "engine"}
    fit = [row for row in rows if row["latency_ms"] is not None and all(row[k] == v for k, v in wanted.items())]
    return min(fit, key=lambda row: float(row["latency_ms"]["p50"]), default=None)


def _tone(row: Row) -> str:
    if row["runtime"] == "engine":
        return TONES[row["precision"]]
    return {"torch-eager": "eager", "vllm": "vllm"}.get(row["runtime"], "peer")
