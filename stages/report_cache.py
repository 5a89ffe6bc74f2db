"""Cache policies for the report: how many requests each misses, trace by trace, and the whole table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.caching.compare import LIMIT, OURS, means, table
from stages.charts import Bar, bar_chart
from stages.charts import table as html_table


def cache(scores: Sequence[Mapping[str, Any]]) -> str:
    """A chart for each trace, budgets side by side, and the table of all; empty when nothing was compared."""
    if not scores:
        return ""
    charts = []
    cells = means(scores)
    for trace in dict.fromkeys(trace for trace, _, _ in cells):
        bars = [
            Bar(
                label=policy,
                value=found["miss_ratio"],
                text=f"{found['miss_ratio']:.1%}",
                note=f"at {budget:.0%}",
                tone="ours-0" if policy.startswith(OURS) else "eager" if policy == LIMIT else "peer",
            )
            for (of, budget, policy), found in sorted(cells.items(), key=lambda cell: cell[0][1])
            if of == trace
        ]
        charts.append(bar_chart(f"Requests that missed, {trace}", bars, caption="Fewer is better."))
    header, rows = table(scores)
    note = (
        "Byte-hit ratio, and in brackets the share of requests that missed; budgets are shares of all states' bytes; "
        "means over draws of each trace. "
        f"{LIMIT} knows the future: what no policy can beat."
    )
    whole = f'{html_table(header, rows)}<p class="caption">{note}</p>'
    shown = "".join(charts)
    return f'<div class="charts">{shown}</div><details><summary>All figures</summary>{whole}</details>'
