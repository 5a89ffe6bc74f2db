"""The report's chapter on speed and memory, and how a runtime is called and coloured everywhere in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hstu.tolerances import TOLERANCES
from stages.charts import Bar, bar_chart, table
from stages.gate_checks import is_disturbed
from stages.measure.cases import CASES
from stages.report_evidence import Evidence, Row

TONES = {"fp32": "ours-0", "bf16": "ours-1", "int8": "ours-2", "fp16": "ours-3"}
ENTRIES = {
    "retrieve": "Retrieve: a history in, the top 100 of the whole corpus out",
    "rank": "Rank: a history and its candidates in, a score per task out",
    "generate": "Generate: a slate of 10 items, one after the other",
    "extend": "Extend: a user comes back; engines have the state of the visit before, the others compute all anew",
}
RUNTIMES = ("torch-eager", "torch-compile", "onnx-plain", "openvino-plain", "engine", "engine-padded", "vllm")


def speed(evidence: Evidence) -> str:
    """Latency, throughput and memory of every runtime, case by case."""
    parts = []
    cases = evidence.benchmark["cases"]
    for case in sorted(cases, key=[case.name for case in CASES].index):
        about = cases[case]
        rows = [row for row in evidence.rows if row["case"] == case]
        parts.append(f"<h3>{escape(case)}: {escape(about['summary'])}</h3>")
        scaling = [row for row in evidence.benchmark.get("scaling", []) if row["case"] == case]
        parts.append(_one_user(rows, scaling))
        parts.append(_returning(rows))
        parts.append(_batches(rows))
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


def _one_user(rows: Sequence[Row], scaling: Sequence[Row]) -> str:
    """Retrieve for one user on one thread: speed, share of the ceiling, memory, and what more threads are worth."""
    threads = {_runtime(row): row for row in scaling}
    body, products = [], set()
    for row in sorted(rows, key=_order):
        if (row["entry"], row["batch"], row["thread_mode"]) != ("retrieve", 1, "one") or row["latency_ms"] is None:
            continue
        share, more = row.get("share_of_ceiling"), threads.get(_runtime(row))
        if share is not None and row.get("ceiling_product"):
            products.add((row["precision"], row["ceiling_gflops"], row["ceiling_product"]))
        memory = row.get("memory_ratio")
        body.append(
            [
                label(row), f"{row['latency_ms']['p50']:.4g}", _ratio(row) or "1.00×",
                _times(row.get("ratio_to_plain")),
                "–" if share is None else f"{share:.0%}",
                "–" if more is None else f"{more['scaling']:.2f}×",
                f"{row['peak_memory_mib']:,.0f}",
                "–" if memory is None else f"{memory:.2f}×",
            ]
        )  # fmt: skip
    if not body:
        return ""
    count = max((row["threads"] for row in scaling), default=0)
    more_threads = f"{count} threads" if count else "more threads"
    head = ("one user, one thread", "p50 ms", "× eager", "× plain export", "of the ceiling", more_threads, "MiB",
            "× least memory")  # fmt: skip
    told = "; ".join(f"{precision} {gflops:,.0f} ({product})" for precision, gflops, product in sorted(products))
    note = (
        "The ceiling is the fastest matrix product of this model's shapes by any library here, measured in the same "
        f"rounds, in GFLOP/s: {told}. The share is the least work of an answer at that rate over its median time. "
        "The least memory is the fp32 weights once and the activations of one layer."
    )
    return f'{table(head, body)}<p class="caption">{escape(note)}</p>'


def _returning(rows: Sequence[Row]) -> str:
    """A user who comes back: time by number of new events, beside the plain export that computes all anew."""
    found = [r for r in rows if r["entry"] == "extend" and r["thread_mode"] == "one" and r["latency_ms"] is not None]
    if not found:
        return ""
    body = [
        [
            label(row), str(row.get("new_events", 0)), str(row["length"]), f"{row['latency_ms']['p50']:.4g}",
            _ratio(row) or "1.00×", _times(row.get("ratio_to_plain")),
        ]
        for row in sorted(found, key=lambda r: (-r.get("new_events", 0), *_order(r)))
    ]  # fmt: skip
    head = ("returning user, one thread", "new events", "history", "p50 ms", "× eager", "× plain export")
    return table(head, body)


def _batches(rows: Sequence[Row]) -> str:
    """Retrieve for batches on all threads, full and partly full."""
    found = [
        r
        for r in rows
        if (r["entry"], r["thread_mode"]) == ("retrieve", "all") and r["batch"] > 1 and r["latency_ms"] is not None
    ]
    if not any(row["occupancy"] < 1.0 for row in found):
        return ""
    body = [
        [
            label(row), str(row["batch"]), f"{row['occupancy']:.0%}", f"{row['latency_ms']['p50']:.4g}",
            f"{row['throughput_rps']:,.1f}", _ratio(row) or "1.00×", _times(row.get("ratio_to_plain")),
            _times(row.get("ratio_to_padded")),
        ]
        for row in sorted(found, key=lambda r: (r["batch"], -r["occupancy"], *_order(r)))
    ]  # fmt: skip
    head = ("batches, all threads", "users", "full", "p50 ms", "users/s", "× eager", "× plain export", "× padded")
    return f"<details><summary>Batches, full and partly full</summary>{table(head, body)}</details>"


def _runtime(row: Row) -> tuple[str, str, str]:
    return row["runtime"], row["backend"], row["precision"]


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _entry_charts(rows: Sequence[Row]) -> str:
    full = [row for row in rows if row["occupancy"] == 1.0 and row["latency_ms"] is not None]
    charts = []
    newest = max((row.get("new_events", 0) for row in full), default=0)  # of returning users the chart shows one kind
    full = [row for row in full if row.get("new_events", 0) == newest]
    for mode, words in (("one", "one thread"), ("all", "all threads")):
        single = sorted((r for r in full if r["batch"] == 1 and r["thread_mode"] == mode), key=_order)
        if single:
            bars = [
                Bar(label=label(row), value=row["latency_ms"]["p50"], whisker=row["latency_ms"]["p95"],
                    text=f"{row['latency_ms']['p50']:.3g} ms", note=_ratio(row), tone=_tone(row))
                for row in single
            ]  # fmt: skip
            charts.append(bar_chart(f"Latency, one user, {words}", bars, caption="Median; the line reaches to p95."))
    largest = max((row["batch"] for row in full if row["thread_mode"] == "all"), default=1)
    many = sorted((r for r in full if r["batch"] == largest and r["thread_mode"] == "all"), key=_order)
    if largest > 1:
        bars = [
            Bar(label=label(row), value=row["throughput_rps"], text=f"{row['throughput_rps']:,.0f}/s",
                note=_ratio(row), tone=_tone(row))
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
        rows, key=lambda r: (list(ENTRIES).index(r["entry"]), r["threads"], r["batch"], -r["occupancy"], *_order(r))
    ):
        latency, interval, share = row["latency_ms"], row["ratio_ci95"], row["share_of_ceiling"]
        timed = latency is not None
        body.append(
            [
                row["entry"] + (f" {row.get('new_events', 0)} new" if row.get("new_events", 0) else ""), label(row),
                str(row["batch"]), f"{row['occupancy']:.0%}", str(row["threads"]),
                *(f"{latency[name]:.4g}" if timed else "wrong" for name in ("p50", "p95", "p99")),
                f"{row['throughput_rps']:,.1f}" if timed else "–",
                _ratio(row) or "1" if timed else "–",
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


def label(row: Row) -> str:
    """What a runtime is called; † where a peer is timed although its answers are wrong."""
    wrong = " †" if not row["correct"] and row["latency_ms"] is not None else ""
    return _name(row) + wrong


def _name(row: Row) -> str:
    if row["runtime"] == "engine":
        return f"{row['backend']} {row['precision']}"
    if row["runtime"] == "engine-padded":
        return f"{row['backend']} {row['precision']} padded"
    return str(row["runtime"]) if row["precision"] == "fp32" else f"{row['runtime']} {row['precision']}"


def _ratio(row: Row) -> str:
    disturbed = " ~" if is_disturbed(row) else ""
    reference = (row["runtime"], row["precision"]) == ("torch-eager", "fp32")
    return disturbed.strip() if reference else f"{row['ratio_to_eager']:.2f}×{disturbed}"


def _tone(row: Row) -> str:
    if row["runtime"] == "engine":
        return TONES[row["precision"]]
    return {"torch-eager": "eager", "vllm": "vllm"}.get(row["runtime"], "peer")


def _order(row: Row) -> tuple[int, str, int]:
    return RUNTIMES.index(row["runtime"]), str(row["backend"]), precision_order(row["precision"])


def precision_order(name: str) -> int:
    precision = name.partition("-")[0]
    return list(TOLERANCES).index(precision) if precision in TOLERANCES else len(TOLERANCES)
