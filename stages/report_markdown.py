"""The measurements as Markdown: for a pull request, and for docs/PERFORMANCE.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.measure.cases import CASES
from stages.report_tables import Table, batches, one_user, returning


def markdown(benchmark: Mapping[str, Any], ladder: Table | None = None) -> str:
    """The ladder; every case with its tables: one user on one thread, returning users, batches."""
    environment = benchmark["environment"]
    parts = [
        "# Measured",
        f"{environment['cpu_model']}, {environment['cores']} cores ({', '.join(environment['instruction_sets'])}), "
        f"bundle `{benchmark['bundle'][:12]}`. Ratios are medians over interleaved rounds; ~ marks a row during which "
        "other work had the cores, † a peer that is timed although its answers are wrong.",
    ]
    if ladder is not None:
        parts += ["## What each step is worth", _table(ladder)]
    for case in (case.name for case in CASES if case.name in benchmark["cases"]):
        rows = [row for row in benchmark["results"] if row["case"] == case]
        scaling = [row for row in benchmark.get("scaling", []) if row["case"] == case]
        parts.append(f"## {case}: {benchmark['cases'][case]['summary']}")
        parts += [_table(found) for found in (one_user(rows, scaling), returning(rows), batches(rows)) if found]
        if benchmark["cases"][case].get("left_out"):
            parts.append(f"Left out: {benchmark['cases'][case]['left_out']}")
    return "\n\n".join(parts) + "\n"


def _table(found: Table) -> str:
    lines = [found.head, ["---"] + ["---:"] * (len(found.head) - 1), *found.body]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{text}\n\n{found.note}" if found.note else text
