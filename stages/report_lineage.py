"""Lineage for the report: a graph of what the bundle was made from, and each artifact with its tools."""

from __future__ import annotations

from html import escape

from stages.report_evidence import Evidence
from stages.report_tables import precision_order

WIDTH, HEIGHT, GAP_X, GAP_Y = 172, 44, 40, 12  # of a box and between boxes, in units of the drawing


def lineage(evidence: Evidence) -> str:
    """The graph, sources on the left; below it every artifact's inputs and tools."""
    items = []
    for name, (identity, manifest) in sorted(evidence.lineage.items(), key=lambda item: depth(item[0], evidence)):
        tools = ", ".join(f"{tool} {version}" for tool, version in sorted(manifest["toolchain"].items()))
        made = ", ".join(sorted(manifest["inputs"])) or "nothing before it"
        items.append(
            f"<li><b>{escape(name)}</b> <code>{identity[:12]}</code><br>"
            f'<span class="soft">from {escape(made)}{f" · {escape(tools)}" if tools else ""}</span></li>'
        )
    listed = f'<ol class="chain">{"".join(items)}</ol>'
    return f"{graph(evidence)}<details><summary>Inputs and tools of each artifact</summary>{listed}</details>"


def graph(evidence: Evidence) -> str:
    """A drawing of the artifacts and which was made from which; wider than a phone, so it scrolls on its own."""
    columns: dict[int, list[str]] = {}
    for name in sorted(evidence.lineage, key=lambda name: depth(name, evidence)):
        columns.setdefault(depth(name, evidence)[0], []).append(name)
    tallest = max(len(names) for names in columns.values())
    height = tallest * (HEIGHT + GAP_Y) - GAP_Y + 4
    places: dict[str, tuple[float, float]] = {}
    for column, at in enumerate(sorted(columns)):
        names = columns[at]
        top = 2 + (height - 4 - len(names) * (HEIGHT + GAP_Y) + GAP_Y) / 2
        for row, name in enumerate(names):
            places[name] = 2 + column * (WIDTH + GAP_X), top + row * (HEIGHT + GAP_Y)
    width = len(columns) * (WIDTH + GAP_X) - GAP_X + 4
    parts = []
    for name, (x, y) in places.items():
        for parent in direct(name, evidence):
            if parent in places:
                from_x, from_y = places[parent]
                start, end, middle = from_x + WIDTH, x, GAP_X / 2
                parts.append(
                    f'<path class="edge" d="M{start:g} {from_y + HEIGHT / 2:g} C{start + middle:g} '
                    f'{from_y + HEIGHT / 2:g} {end - middle:g} {y + HEIGHT / 2:g} {end:g} {y + HEIGHT / 2:g}"/>'
                )
    for name, (x, y) in places.items():
        called = escape(name.replace("build-engine-", "engine "))
        parts.append(
            f'<rect class="node" x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
            f'<text class="name" x="{x + 10:g}" y="{y + 19:g}">{called}</text>'
            f'<text class="id" x="{x + 10:g}" y="{y + 35:g}">{evidence.lineage[name][0][:12]}</text>'
        )
    label = f"{len(places)} artifacts, from {escape(next(iter(places)))} to the bundle"
    size = f'viewBox="0 0 {width:g} {height:g}"'
    return f'<div class="scroll graph"><svg role="img" aria-label="{label}" {size}>{"".join(parts)}</svg></div>'


def direct(name: str, evidence: Evidence) -> list[str]:
    """The inputs of an artifact that are not inputs of its other inputs, too: what a drawing needs."""
    inputs = _inputs(name, evidence)
    behind = {ancestor for one in inputs for ancestor in _ancestors(one, evidence)}
    return [one for one in inputs if one not in behind]


def _inputs(name: str, evidence: Evidence) -> list[str]:
    manifest = evidence.lineage[name][1] if name in evidence.lineage else {"inputs": {}}
    return [parent.replace("/", "-") for parent in manifest["inputs"]]


def _ancestors(name: str, evidence: Evidence) -> set[str]:
    inputs = _inputs(name, evidence)
    return set(inputs) | {ancestor for one in inputs for ancestor in _ancestors(one, evidence)}


def depth(name: str, evidence: Evidence) -> tuple[int, int, str]:
    """How many steps lie before an artifact."""
    steps = [depth(parent, evidence)[0] for parent in _inputs(name, evidence)]
    return 1 + max(steps, default=0), precision_order(name.removeprefix("build-engine-")), name
