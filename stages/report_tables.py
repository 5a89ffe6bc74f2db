"""The tables of the report, for the page and for Markdown alike, and how a runtime is called everywhere in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hstu.tolerances import TOLERANCES
from stages.gate_checks import is_disturbed
from stages.report_evidence import Row

RUNTIMES = (
    "torch-eager", "torch-features", "torch-compile", "onnx-plain", "openvino-plain", "engine", "engine-padded", "vllm",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Text cells; all columns but the first hold figures."""

    head: tuple[str, ...]
    body: list[list[str]]
    note: str = ""


def one_user(rows: Sequence[Row], scaling: Sequence[Row]) -> Table | None:
    """Retrieve for one user on one thread: speed, share of the ceiling, memory, and what more threads are worth."""
    threads = {_runtime(row): row for row in scaling}
    body, products = [], set()
    for row in sorted(rows, key=order):
        if (row["entry"], row["batch"], row["thread_mode"]) != ("retrieve", 1, "one") or row["latency_ms"] is None:
            continue
        share, more = row.get("share_of_ceiling"), threads.get(_runtime(row))
        if share is not None and row.get("ceiling_product"):
            products.add((row["precision"], row["ceiling_gflops"], row["ceiling_product"]))
        memory = row.get("memory_ratio")
        body.append(
            [
                label(row), f"{row['latency_ms']['p50']:.4g}", ratio(row) or "1.00×",
                _times(row.get("ratio_to_plain")),
                "–" if share is None else f"{share:.0%}",
                "–" if more is None else f"{more['scaling']:.2f}×",
                f"{row['peak_memory_mib']:,.0f}",
                "–" if memory is None else f"{memory:.2f}×",
            ]
        )  # fmt: skip
    if not body:
        return None
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
    return Table(head=head, body=body, note=note)


def returning(rows: Sequence[Row]) -> Table | None:
    """A user who comes back: time by number of new events, beside the plain export that computes all anew."""
    found = [r for r in rows if r["entry"] == "extend" and r["thread_mode"] == "one" and r["latency_ms"] is not None]
    if not found:
        return None
    body = [
        [
            label(row), str(row.get("new_events", 0)), str(row["length"]), f"{row['latency_ms']['p50']:.4g}",
            ratio(row) or "1.00×", _times(row.get("ratio_to_plain")),
        ]
        for row in sorted(found, key=lambda r: (-r.get("new_events", 0), *order(r)))
    ]  # fmt: skip
    head = ("returning user, one thread", "new events", "history", "p50 ms", "× eager", "× plain export")
    return Table(head=head, body=body)


def batches(rows: Sequence[Row]) -> Table | None:
    """Retrieve for batches on all threads, full and partly full."""
    found = [
        r
        for r in rows
        if (r["entry"], r["thread_mode"]) == ("retrieve", "all") and r["batch"] > 1 and r["latency_ms"] is not None
    ]
    if not any(row["occupancy"] < 1.0 for row in found):
        return None
    body = [
        [
            label(row), str(row["batch"]), f"{row['occupancy']:.0%}", f"{row['latency_ms']['p50']:.4g}",
            f"{row['throughput_rps']:,.1f}", ratio(row) or "1.00×", _times(row.get("ratio_to_plain")),
            _times(row.get("ratio_to_padded")),
        ]
        for row in sorted(found, key=lambda r: (r["batch"], -r["occupancy"], *order(r)))
    ]  # fmt: skip
    head = ("batches, all threads", "users", "full", "p50 ms", "users/s", "× eager", "× plain export", "× padded")
    return Table(head=head, body=body)


def _runtime(row: Row) -> tuple[str, str, str]:
    return row["runtime"], row["backend"], row["precision"]


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


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


def ratio(row: Row) -> str:
    """ratio_to_eager as text, ~ where other work disturbed it; nothing for the reference itself."""
    disturbed = " ~" if is_disturbed(row) else ""
    reference = (row["runtime"], row["precision"]) == ("torch-eager", "fp32")
    return disturbed.strip() if reference else f"{row['ratio_to_eager']:.2f}×{disturbed}"


def order(row: Row) -> tuple[int, str, int]:
    """What rows are sorted by: peers first, then engines from the widest precision on."""
    return RUNTIMES.index(row["runtime"]), str(row["backend"]), precision_order(row["precision"])


def precision_order(name: str) -> int:
    precision = name.partition("-")[0]
    return list(TOLERANCES).index(precision) if precision in TOLERANCES else len(TOLERANCES)
