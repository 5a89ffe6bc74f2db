"""The report: one HTML page with everything in it, and the tables that `dvc plots` draws. Same inputs, same bytes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from stages import report_sections as sections
from stages.contract import Workspace
from stages.gate import BENCHMARK
from stages.generation import measure
from stages.report_cache import cache
from stages.report_evidence import Evidence, gather, read_gpus, read_ladder
from stages.report_ladder import ladder_html, ladder_table
from stages.report_lineage import lineage
from stages.report_markdown import markdown
from stages.report_speed import speed
from stages.report_style import STYLE

PAGE = "report.html"
PLOTS = "plots"
SUMMARY = "summary.md"


def write_report_page(workspace: Workspace) -> Path:
    """`reports/report.html` tells what the reports and the bundle's artifacts hold; InputError without a benchmark."""
    path = workspace.reports / PAGE
    data = page(gather(workspace)).encode()
    staged = path.with_name(f".{PAGE}.tmp")
    staged.write_bytes(data)
    staged.replace(path)
    return path


def refresh(workspace: Workspace) -> None:
    """The page and the summary tell what the reports hold now; nothing happens before there is a benchmark."""
    path = workspace.reports / BENCHMARK
    if path.is_file():
        write_summary(json.loads(path.read_bytes()), workspace.reports)
        write_report_page(workspace)


def page(evidence: Evidence) -> str:
    """The whole page: style inside, nothing loaded, no script."""
    identity = evidence.lineage["bundle"][0]
    title = f"HSTU bundle {evidence.description['version']}"
    chapters = [
        ("lineage", "What it was made from", lineage(evidence)),
        ("ladder", "What each step is worth", ladder_html(evidence.ladder, evidence.gpus)),
        ("quality", "Model and data", sections.quality(evidence)),
        ("gates", "What each precision costs", sections.gates(evidence)),
        ("speed", "Speed and memory", speed(evidence)),
        ("cache", "Cache policies", cache(evidence.cache_scores)),
        ("generation", "vLLM beside ideal loops", measure.html_table(evidence.generation)),
        ("skipped", "Not measured", sections.skipped(evidence)),
        ("gate", "Against the baseline", sections.gate(evidence)),
        ("conformance", "Conformance", sections.conformance(evidence)),
        ("environment", "Environment", sections.environment(evidence)),
    ]
    chapters = [chapter for chapter in chapters if chapter[2]]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in chapters)
    body = "".join(f'<section id="{anchor}"><h2>{escape(name)}</h2>{html}</section>' for anchor, name, html in chapters)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<div class="soft">bundle <code>{identity[:12]}</code>, default engine '
        f"{escape(evidence.description['default_engine'])}</div>\n{sections.verdict(evidence)}\n"
        f"<nav>{links}</nav>\n{body}\n</main>\n</body>\n</html>\n"
    )


def write_summary(benchmark: Mapping[str, Any], reports: Path) -> None:
    """`reports/summary.md` has the ladder and the tables of the benchmark as Markdown."""
    staged = reports / f".{SUMMARY}.tmp"
    ladder = read_ladder(reports)
    staged.write_text(markdown(benchmark, None if ladder is None else ladder_table(ladder, read_gpus(reports))))
    staged.replace(reports / SUMMARY)


def write_plots(benchmark: Mapping[str, Any], reports: Path) -> None:
    """`reports/plots/` holds one table a chart of `dvc plots`: full histories, all threads.

    latency and throughput are of the bundle's own model, whose figures share a scale; ratio is of every case.
    """
    rows = [
        row
        for row in benchmark["results"]
        if row["latency_ms"] is not None and row["occupancy"] == 1.0 and row["thread_mode"] == "all"
    ]
    own = [row for row in rows if row["case"] == "trained" and row["entry"] != "generate"]
    largest = max((row["batch"] for row in own), default=1)
    tables = {
        "latency": ("p50_ms", [(row, row["latency_ms"]["p50"]) for row in own if row["batch"] == 1]),
        "throughput": ("users_per_second", [(row, row["throughput_rps"]) for row in own if row["batch"] == largest]),
        "ratio": ("ratio_to_eager", [(row, row["ratio_to_eager"]) for row in rows if row["batch"] == 1]),
    }
    for name, (figure, values) in tables.items():
        _write_table(reports / PLOTS / f"{name}.csv", figure, values)


def _write_table(path: Path, figure: str, rows: Sequence[tuple[Mapping[str, Any], float]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["what", figure])
    for row, value in rows:
        engine = f" {row['backend']} {row['precision']}" if row["runtime"] == "engine" else ""
        engine = engine or (f" {row['precision']}" if row["precision"] != "fp32" else "")
        new = f" {row['new_events']} new" if row.get("new_events") else ""
        writer.writerow([f"{row['case']} {row['entry']}{new} {row['runtime']}{engine}", value])
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_text(text.getvalue())
    staged.replace(path)
