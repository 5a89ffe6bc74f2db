"""The sections of the report: each turns what was measured into HTML, and says nothing that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hstu.tolerances import TOLERANCES
from stages.charts import Bar, bar_chart, milliseconds, table
from stages.gate_checks import is_disturbed
from stages.measure.contestants import PEERS
from stages.report_evidence import Evidence
from stages.report_speed import fastest
from stages.report_tables import label, precision_order


def verdict(evidence: Evidence) -> str:
    """The answer first: is this bundle right, is it fast, is it worse than the accepted one."""
    rows, found = evidence.rows, evidence.verdict
    wrong = [row for row in rows if not row["correct"] and row["runtime"] not in PEERS]
    off = [row for row in rows if not row["correct"] and row["runtime"] in PEERS]
    status = "fail" if wrong or (found and found.status == "fail") else found.status if found else "pass"
    lines = []
    if wrong:
        lines.append(f"<strong>{len(wrong)} of {len(rows)} results are wrong.</strong> They were not timed.")
    else:
        lines.append(
            f"<strong>All {len(rows) - len(off)} results agree with eager PyTorch</strong> within their precision's "
            "tolerance; each was checked before it was timed."
        )
    if off:
        names = ", ".join(sorted({label(row) for row in off}))
        lines.append(
            f"{len(off)} results of peers ({escape(names)}) are wrong; where one is timed all the same, as a hurdle "
            "for ours, it is marked †."
        )
    if found is None:
        lines.append("No baseline has been accepted yet, so nothing says whether this is better or worse than before.")
    elif found.status == "pass":
        lines.append(f"Against the accepted baseline: {found.count('pass')} checks pass, none fails.")
    else:
        lines.append(
            f"Against the accepted baseline: {found.count('fail')} checks fail, "
            f"{found.count('inconclusive')} cannot be judged, {found.count('pass')} pass."
        )
    disturbed = sum(is_disturbed(row) for row in rows)
    if disturbed:
        lines.append(
            f"{disturbed} of {len(rows)} timings were disturbed: other work had the cores meanwhile. They are marked ~ "
            "and say little."
        )
    if evidence.benchmark["skipped"]:
        count = len(evidence.benchmark["skipped"])
        lines.append(f"{count} runtime{'s' if count > 1 else ''} could not be measured; the reasons stand below.")
    return f'<div class="verdict {status}">{"".join(f"<p>{line}</p>" for line in lines)}</div>{_tiles(evidence)}'


def _tiles(evidence: Evidence) -> str:
    tiles = []
    best = fastest(evidence.rows, "trained", batch=1)
    if best is not None:
        tiles.append(
            (milliseconds(best["latency_ms"]["p50"]), "to retrieve for one user, median",
             f"{label(best)}, {best['ratio_to_eager']:.2f} × as fast as eager PyTorch in the same run")
        )  # fmt: skip
    most = fastest(evidence.rows, "trained", batch=32)
    if most is not None:
        tiles.append((f"{most['throughput_rps']:,.0f}", "users a second, batches of 32", label(most)))
    quality = evidence.metrics.get("checkpoint", {})
    if "hr_at_10" in quality:
        rival = max((n for n in quality if n.endswith("_hr_at_10")), key=lambda n: quality[n], default=None)
        why = "" if rival is None else f"best baseline ({_baseline(rival)}): {quality[rival]:.3f}"
        tiles.append((f"{quality['hr_at_10']:.3f}", "HR@10 on held-out users", why))
    if "bundle" in evidence.metrics:
        engines = ", ".join(evidence.description["engines"])
        tiles.append((f"{evidence.metrics['bundle']['bundle_mib']:.1f} MiB", "bundle", f"engines {engines}"))
    boxes = "".join(
        f'<div class="tile"><div class="figure">{escape(figure)}</div><div class="what">{escape(what)}</div>'
        f'<div class="why">{escape(why)}</div></div>'
        for figure, what, why in tiles
    )
    return f'<div class="tiles">{boxes}</div>'


def quality(evidence: Evidence) -> str:
    """The model and the data: how well it ranks beside what it has to beat."""
    metrics = evidence.metrics.get("checkpoint", {})
    charts = []
    for name, title in (("hr_at_10", "HR@10: the next item is among ten"), ("ndcg_at_10", "NDCG@10: and how high")):
        if name in metrics:
            rivals = sorted((n for n in metrics if n.endswith(f"_{name}")), key=lambda n: -metrics[n])
            bars = [Bar(label="this model", value=metrics[name], text=f"{metrics[name]:.4f}", tone="ours-0")]
            bars += [Bar(label=_baseline(n), value=metrics[n], text=f"{metrics[n]:.4f}", tone="eager") for n in rivals]
            charts.append(bar_chart(title, bars, caption="Held-out users, whole corpus, nothing filtered."))
    tasks = sorted(name for name in metrics if name.startswith("auc_"))
    if tasks:
        bars = [
            Bar(label=name.removeprefix("auc_"), value=metrics[name] - 0.5, text=f"{metrics[name]:.4f}", tone="ours-0")
            for name in tasks
        ]
        charts.append(bar_chart("AUC of the task heads, above 0.5", bars, caption="A constant has 0.5."))
    if not charts:
        text = "This checkpoint came without an event log, so its ranking quality is not known here."
        return f"<p>{text}</p>{_data(evidence)}"
    return f'<div class="charts">{"".join(charts)}</div>{_data(evidence)}'


def _data(evidence: Evidence) -> str:
    """Facts of the model and every number that preparing the data reported."""
    facts: list[tuple[str, str]] = []
    shape = ""
    model = evidence.benchmark["cases"].get("trained", {}).get("model")
    if model:
        shape = (
            f"<p>{model['num_layers']} layers, width {model['embedding_dim']}, {model['num_heads']} heads, "
            f"{model['num_items']:,} items, histories of up to {model['max_history']} events.</p>"
        )
    parameters = evidence.metrics.get("checkpoint", {}).get("num_parameters")
    if parameters:
        facts.append(("parameters", f"{parameters:,}"))
    for name, value in _flat(evidence.metrics.get("prepare-data", {})):
        facts.append((name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
    pairs = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'{shape}<dl class="compact">{pairs}</dl>'


def gates(evidence: Evidence) -> str:
    """What each precision costs in accuracy, each figure beside the limit that the gate usually sets."""
    rows = []
    for name, metrics in evidence.metrics.items():
        engine = name.removeprefix("build-engine-")
        if engine == name or name not in evidence.lineage or "embedding_cosine" not in metrics:
            continue  # of another stage, or of an engine that is not in this bundle
        limit = TOLERANCES[engine.partition("-")[0]]
        hit, kept = metrics.get("hr_at_10"), "–"
        if hit is not None:
            kept = _figure(f"{-100 * hit['relative_loss'] + 0.0:+.2f} %", f"≥ −{100 * limit.max_quality_loss:g} %")
        rows.append(
            [
                escape(engine),
                _figure(f"{metrics['embedding_cosine']['mean']:.6f}", f"≥ {limit.min_mean_cosine:g}"),
                _figure(f"{metrics['embedding_cosine']['min']:.6f}", f"≥ {limit.min_cosine:g}"),
                _figure(f"{metrics['top10_overlap']:.4f}", f"≥ {limit.min_top10_overlap:g}"),
                _figure(f"{max(metrics['max_abs_error'].values()):.1e}", f"≤ {limit.max_abs_error:g}"),
                "–" if hit is None else f"{hit['engine']:.4f}",
                kept,
                f"{metrics['bytes'] / 2**20:.2f} MiB",
            ]
        )
    head = (
        "engine",
        "mean cosine",
        "lowest cosine",
        "top-10 overlap",
        "max abs error",
        "HR@10",
        "against fp32",
        "size",
    )
    note = "Held-out users, against eager PyTorch in fp32. An engine beyond a limit is refused when it is built."
    body = sorted(rows, key=lambda row: precision_order(row[0]))
    return f'{table(head, body, raw=True)}<p class="caption">{note}</p>'


def _figure(value: str, limit: str) -> str:
    return f'{value}<br><span class="note">{limit}</span>'


def skipped(evidence: Evidence) -> str:
    """What is missing from the charts, and why."""
    rows = [
        [row["case"], f"{row['runtime']} {row['precision']}", str(row["reason"])]
        for row in evidence.benchmark["skipped"]
    ]
    return table(("case", "runtime", "reason"), rows, numeric_from=9) if rows else ""


def gate(evidence: Evidence) -> str:
    """What the comparison with the baseline found, the failures first."""
    if evidence.verdict is None:
        accept = "<code>python cli.py gate --accept --reason TEXT</code>"
        return f"<p>There is no reports/baseline.json; {accept} makes one of this benchmark.</p>"
    order = ("fail", "inconclusive", "info", "pass")
    shown = [c for c in evidence.verdict.checks if c.status in ("fail", "inconclusive") or c.kind.endswith("of all")]
    rows = [
        [
            f'<span class="{c.status}-text">{c.status}</span>',
            escape(f"{c.kind}: {c.what}"),
            escape(c.got),
            escape(c.limit),
        ]
        for c in sorted(shown, key=lambda c: order.index(c.status))
    ]
    note = f"<p>{escape(evidence.verdict.note)}</p>" if evidence.verdict.note else ""
    head = ("", "what", "now", "limit")
    rest = len(evidence.verdict.checks) - len(shown)
    return (
        note
        + table(head, rows, numeric_from=9, raw=True)
        + f'<p class="caption">{rest} further checks pass or inform.</p>'
        + _trials(evidence)
    )


def _trials(evidence: Evidence) -> str:
    """How often the gate of two bundles fails one that is equal, and one that was made slower."""
    if evidence.trials is None:
        return ""
    found = evidence.trials["summary"]
    slower = f"made {evidence.trials['slowdown']:.0%} slower"
    rows = []
    for kind, name in (("equal", "a bundle beside itself"), ("slower", slower)):
        if kind in found:
            low, high = found[kind]["failed_share_ci95"]
            counts = (str(found[kind][status]) for status in ("runs", "fail", "inconclusive", "pass"))
            rows.append([name, *counts, f"{low:.0%} to {high:.0%}"])
    head = ("gate --against, tried", "runs", "fail", "inconclusive", "pass", "95 % interval of failing")
    return table(head, rows)


def conformance(evidence: Evidence) -> str:
    """Engines that were built from the same ONNX for devices that are not here."""
    if not evidence.built_only:
        return _matrix(evidence) or "<p>None was built in this workspace.</p>"
    rows = []
    for name, manifest in evidence.built_only.items():
        platform = manifest.get("platform", {})
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        rows.append(
            [name, f"{platform.get('product', '')} {platform.get('version', '')}", "built, not executed",
             str(platform.get("device", "")), f"{size / 2**20:.2f} MiB"]
        )  # fmt: skip
    note = (
        "NVIDIA's own parser and builder took the graph and built an engine from it. No device here can run it, so "
        "nothing is said of its answers or its speed."
    )
    engines = table(("engine", "built by", "state", "for", "size"), rows, numeric_from=4)
    return f"<p>{note}</p>{engines}{_matrix(evidence)}"


def _matrix(evidence: Evidence) -> str:
    """Which graphs of which models NVIDIA's builder took, and its own reason for each that it refused."""
    if not evidence.conformance:
        return ""
    found = {(row.model, row.entry, row.precision): row for row in evidence.conformance}
    columns = list(dict.fromkeys(row.precision for row in evidence.conformance))
    rows = []
    for model, entry in dict.fromkeys((row.model, row.entry) for row in evidence.conformance):
        cells = [found.get((model, entry, precision)) for precision in columns]
        rows.append([model, entry, *(cell.result if cell else "–" for cell in cells)])
    refused = [row for row in evidence.conformance if row.result == "rejected"]
    reasons = "".join(f"<li>{escape(f'{row.model} {row.entry} {row.precision}: {row.reason}')}</li>" for row in refused)
    versions = ", ".join(sorted({f"{row.product} {row.version}" for row in evidence.conformance}))
    note = f"{len(evidence.conformance) - len(refused)} of {len(evidence.conformance)} graphs built by {versions}."
    listed = f"<ul>{reasons}</ul>" if reasons else ""
    return f'{table(("model", "entry", *columns), rows, numeric_from=9)}{listed}<p class="caption">{escape(note)}</p>'


def environment(evidence: Evidence) -> str:
    """The machine that measured."""
    values = evidence.benchmark["environment"]
    facts = [
        ("processor", f"{values['cpu_model']}, {values['cores']} cores, {values['architecture']}"),
        ("instruction sets", ", ".join(values["instruction_sets"]) or "–"),
        ("memory", f"{values['memory_mib'] / 1024:.1f} GiB"),
        ("GPU", ", ".join(values["gpus"]) or "none"),
        ("system", f"{values['os']}, Python {values['python']}"),
        (
            "calibration workload",
            f"{values['calibration_ms']:.2f} ms (fixed work on one thread: how fast this machine was)",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(values["versions"].items()))),
    ]
    return _facts(facts)


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return f'<dl class="facts">{"".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in facts)}</dl>'


def _baseline(name: str) -> str:
    return name.removesuffix("_hr_at_10").removesuffix("_ndcg_at_10")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name} ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + name, value))
    return found
