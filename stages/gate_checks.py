"""The comparisons of the gate: one function per kind of figure, each gives checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from hstu.tolerances import TOLERANCES

if TYPE_CHECKING:
    from stages.gate import GateParams

KEY = (
    "case", "entry", "runtime", "backend", "precision", "batch", "length", "new_events", "occupancy", "thread_mode",
)  # fmt: skip
REQUIRED = (
    "correct", "max_abs_error", "top10_overlap", "latency_ms", "throughput_rps", "peak_memory_mib", "ratio_to_eager",
)  # fmt: skip
OURS = ("engine", "vllm")  # runtimes whose speed this project answers for; the others are peers
QUALITY = ("hr_at_", "ndcg_at_", "auc_", "top10_overlap", "embedding_cosine")  # names, or beginnings of names
BESIDE = ("fp32_eager", "relative_loss")  # stand below a quality figure and are none of ours
ERROR_FLOOR = 0.1  # of the precision's tolerance: below that an error may grow as it likes
MEMORY_SLACK_MIB = 24.0  # what an allocator may keep more or less
MAX_CORE_WAIT = 0.1  # share of its time that a runtime may have waited for a core; beyond it a speed says little
Z95 = 1.96

Status = Literal["pass", "fail", "inconclusive", "info"]
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One figure against its limit, both as people read them."""

    kind: str
    what: str
    status: Status
    got: str
    limit: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def compare_results(current: Mapping[str, Any], accepted: Mapping[str, Any], params: GateParams) -> list[Check]:
    """The checks of all rows of the cases that the gate is asked about, and of every runtime's speed as a whole."""
    now = {_key(row): row for row in current["results"]}
    before = {_key(row): row for row in accepted["results"] if row.get("case") in params.cases}
    checks = [
        Check(kind="coverage", what=case, status="fail", got="not in the baseline", limit="in the baseline")
        for case in params.cases
        if not any(row.get("case") == case for row in accepted["results"])
    ]
    speed = Speed(params, current.get("environment", {}), accepted.get("environment", {}))
    groups: dict[tuple[Any, ...], list[Change]] = {}
    latencies: dict[tuple[Any, ...], list[float]] = {}
    for key, old in before.items():
        name = _name(old)
        if key not in now:
            reason = _reason(old, current.get("skipped", []))
            checks.append(Check(kind="coverage", what=name, status="fail", got=f"missing{reason}", limit="present"))
            continue
        new = now[key]
        missing = [field for field in REQUIRED if new.get(field) is None and old.get(field) is not None]
        if missing:
            checks.append(
                Check(kind="coverage", what=name, status="fail", got=f"no {', '.join(missing)}", limit="as before")
            )
        found = _correctness(name, new, old, params)
        if old["runtime"] not in OURS:  # what a peer answers is told, and no fault of this build
            found = [replace(check, status="info") if check.status == "fail" else check for check in found]
        checks += found
        if new.get("peak_memory_mib") is not None and old.get("peak_memory_mib") is not None:
            checks.append(_memory(name, new, old, params))
        group = (old["case"], old["runtime"], old["backend"], old["precision"])
        if new.get("ratio_to_eager") is not None and old.get("ratio_to_eager") and old["runtime"] != "torch-eager":
            change = speed.change(new, old)
            checks.append(speed.check(name, [change]))
            groups.setdefault(group, []).append(change)
        if speed.same_machine and new.get("latency_ms") and old.get("latency_ms"):
            latencies.setdefault(group, []).append(math.log(new["latency_ms"]["p50"] / old["latency_ms"]["p50"]))
    checks += [
        speed.check(f"{' '.join(group)}, {len(changes)} rows", changes, kind="speed of all")
        for group, changes in groups.items()
    ]
    checks += [
        Check(
            kind="p50 on this machine",
            what=" ".join(group),
            status="info",
            got=f"{math.expm1(sum(logs) / len(logs)):+.0%}",
            limit="not judged",
        )
        for group, logs in latencies.items()
    ]
    checks += [
        Check(kind="coverage", what=_name(row), status="info", got="new", limit="not compared")
        for key, row in now.items()
        if row["case"] in params.cases and key not in before
    ]
    return checks


def compare_metrics(current: Mapping[str, Any], accepted: Mapping[str, Any], params: GateParams) -> list[Check]:
    """Every quality figure that the accepted metrics hold, wherever it stands in them."""
    now = dict(_numbers(current))
    checks = []
    for path, old in _numbers(accepted):
        parts = path.split("/")
        if parts[-1] in BESIDE or not any(part.startswith(QUALITY) for part in parts):
            continue
        if path not in now:
            checks.append(Check(kind="quality", what=path, status="fail", got="missing", limit=f"{old:.4f} before"))
            continue
        limit = old - params.max_quality_drop
        checks.append(
            Check(
                kind="quality",
                what=path,
                status="pass" if now[path] >= limit else "fail",
                got=f"{now[path]:.4f}",
                limit=f">= {limit:.4f} ({old:.4f} before)",
            )
        )
    return checks


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """ln(ratio now / ratio before) of a row, its standard error within the runs, and what is not comparable."""

    log: float
    error: float
    now: float
    before: float
    ours: bool
    doubt: str


class Speed:
    """Judges changes of ratio_to_eager between two runs, on one machine or on two."""

    def __init__(self, params: GateParams, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        self.limit = math.log1p(-params.max_slowdown)
        self.max_slowdown = params.max_slowdown
        self.same_cores = now.get("cores") == before.get("cores")
        self.lost = sorted(set(before.get("instruction_sets", ())) - set(now.get("instruction_sets", ())))
        same_cpu = self.same_cores and all(now.get(k) == before.get(k) for k in ("cpu_model", "instruction_sets"))
        self.row_noise = math.sqrt(2) * params.run_noise  # two runs, each as noisy
        self.same_machine = same_cpu and bool(now)
        self.machine_noise = 0.0 if self.same_machine else params.other_machine_noise

    def change(self, new: Row, old: Row) -> Change:
        """The change of one row."""
        doubt = ""
        if is_disturbed(new) or is_disturbed(old):
            doubt = f"other work had the cores {'now' if is_disturbed(new) else 'then'}"
        elif old.get("thread_mode") == "all" and not self.same_cores:
            doubt = "another number of cores"
        elif old["precision"] != "fp32" and self.lost:
            doubt = f"this CPU lacks {', '.join(self.lost)}"
        return Change(
            log=math.log(new["ratio_to_eager"] / old["ratio_to_eager"]),
            error=math.hypot(_standard_error(new), _standard_error(old)),
            now=new["ratio_to_eager"],
            before=old["ratio_to_eager"],
            ours=old["runtime"] in OURS,
            doubt=doubt,
        )

    def check(self, what: str, changes: Sequence[Change], *, kind: str = "speed") -> Check:
        """Whether the geometric mean of the changes is a slowdown beyond the limit, surely, perhaps or not.

        Noise within and between runs averages over rows; a different machine shifts all rows together.
        """
        comparable = [change for change in changes if not change.doubt] or list(changes)
        count = len(comparable)
        mean = sum(change.log for change in comparable) / count
        within = math.sqrt(sum(change.error**2 + self.row_noise**2 for change in comparable)) / count
        margin = Z95 * math.hypot(within, self.machine_noise)
        status: Status = "pass"
        if comparable[0].doubt and mean < self.limit:
            status = "inconclusive"
        elif mean + margin < self.limit:
            status = "fail"
        elif mean < self.limit:
            status = "inconclusive"
        if not comparable[0].ours and status != "pass":
            status = "info"
        before = math.exp(sum(math.log(c.before) for c in comparable) / count)
        now = math.exp(sum(math.log(c.now) for c in comparable) / count)
        doubt = f", {comparable[0].doubt}" if comparable[0].doubt else ""
        return Check(
            kind=kind,
            what=what,
            status=status,
            got=f"{now:.2f}x eager, {math.expm1(mean):+.0%} ± {math.expm1(margin):.0%}{doubt}",
            limit=f">= {-self.max_slowdown:.0%} ({before:.2f}x before)",
        )


def is_disturbed(row: Row) -> bool:
    """Whether other work had the cores while this row, or eager PyTorch beside it, was timed."""
    return (row.get("core_wait_share") or 0.0) > MAX_CORE_WAIT


def _correctness(name: str, new: Row, old: Row, params: GateParams) -> list[Check]:
    checks: list[Check] = []
    if old.get("correct") is False:
        return checks  # a peer's, for a wrong result of ours becomes no baseline
    if new.get("correct") is not None:
        status: Status = "pass" if new["correct"] is True else "fail"
        checks.append(Check(kind="correct", what=name, status=status, got=str(new["correct"]).lower(), limit="true"))
    if new.get("top10_overlap") is not None and old.get("top10_overlap") is not None:
        limit = old["top10_overlap"] - params.max_overlap_drop
        checks.append(
            Check(
                kind="overlap",
                what=name,
                status="pass" if new["top10_overlap"] >= limit else "fail",
                got=f"{new['top10_overlap']:.4f}",
                limit=f">= {limit:.4f}",
            )
        )
    if new.get("max_abs_error") is not None and old.get("max_abs_error") is not None:
        floor = ERROR_FLOOR * TOLERANCES[old["precision"]].max_abs_error
        limit = max(old["max_abs_error"] * params.max_error_growth, floor)
        checks.append(
            Check(
                kind="error",
                what=name,
                status="pass" if new["max_abs_error"] <= limit else "fail",
                got=f"{new['max_abs_error']:.3g}",
                limit=f"<= {limit:.3g}",
            )
        )
    return checks


def _memory(name: str, new: Row, old: Row, params: GateParams) -> Check:
    limit = old["peak_memory_mib"] * (1 + params.max_memory_growth) + MEMORY_SLACK_MIB
    within = new["peak_memory_mib"] <= limit
    return Check(
        kind="memory",
        what=name,
        status="pass" if within else "fail" if old["runtime"] in OURS else "info",
        got=f"{new['peak_memory_mib']:.0f} MiB",
        limit=f"<= {limit:.0f} MiB",
    )


def _standard_error(row: Row) -> float:
    """Of ln ratio_to_eager within the run, from its 95 % interval; 0 when the row has none."""
    low, high = row.get("ratio_ci95") or (1.0, 1.0)
    return (math.log(high) - math.log(low)) / (2 * Z95) if low > 0 else 0.0


def _numbers(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _numbers(value, f"{path}/{name}" if path else str(name))
    elif isinstance(values, (int, float)) and not isinstance(values, bool):
        yield path, float(values)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) or 0 for name in KEY)


def _name(row: Row) -> str:
    runtime = row["runtime"] if row["precision"] == "fp32" else f"{row['runtime']} {row['precision']}"
    runtime = runtime if row["runtime"] != "engine" else f"engine {row['backend']} {row['precision']}"
    threads = "1 thread" if row.get("thread_mode") == "one" else "all threads"
    new = f" {row['new_events']} new" if row.get("new_events") else ""
    return f"{row['case']} {row['entry']}{new} {runtime} B={row['batch']} {row.get('occupancy', 1.0):.0%} {threads}"


def _reason(row: Row, skipped: Sequence[Row]) -> str:
    for skip in skipped:
        if all(skip.get(name) == row[name] for name in ("case", "runtime", "precision")):
            return f" ({str(skip['reason']).splitlines()[0]})"
    return ""
