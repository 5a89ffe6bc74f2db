"""The optimisation ladder: what each step is worth beside eager PyTorch, all of them in one interleaved run.

One thread. Latency is of one user with a full history, throughput of a batch half of whose positions are padding,
memory the peak of the runtime's own process meanwhile. A user who comes back is measured with eager PyTorch
beside it, which computes the whole history again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu.artifact import open_artifact
from hstu.errors import InputError
from stages.contract import Workspace, hold, say, write_report
from stages.measure.cases import BenchmarkEntry, Case, Cell, find_case
from stages.measure.contestants import EAGER, Contestant, ModelFiles, RuntimeName

if TYPE_CHECKING:
    from stages.measure.session import Session

FILE = "ladder.json"
SCHEMA = 1
BATCH, OCCUPANCY, NEW_EVENTS = 32, 0.5, 10
FIGURES = (
    "correct", "max_abs_error", "top10_overlap", "latency_ms", "throughput_rps", "peak_memory_mib", "ratio_to_eager",
    "ratio_ci95", "core_wait_share", "rounds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One step: the runtime that has it and all before it, asked through `entry`."""

    name: str
    summary: str
    runtime: RuntimeName
    backend: str
    precision: str = "fp32"
    entry: BenchmarkEntry = "retrieve"
    claim: str | None = None  # which of the reference project's claims stands beside it (`stages.report_ladder`)

    def is_of(self, contestant: Contestant) -> bool:
        """Whether this runtime has the step."""
        named = contestant.runtime, contestant.backend, contestant.precision
        return named == (self.runtime, self.backend, self.precision)


# On a CPU the engines in bf16 and int8 stand on kernels of our own, so those come before them; vLLM has kernels of its
# own plan and stands beside the engines, not above them.
RUNGS = (
    Rung(name="eager", summary="eager PyTorch", runtime="torch-eager", backend="torch"),
    Rung(
        name="features", summary="no padding in products, the last layer for one event, still eager PyTorch",
        runtime="torch-features", backend="torch", claim="features",
    ),
    Rung(
        name="ONNX", summary="the plain export on ONNX Runtime",
        runtime="onnx-plain", backend="onnxruntime", claim="ONNX",
    ),
    Rung(
        name="engine fp32", summary="the graph after surgery on ONNX Runtime",
        runtime="engine", backend="onnxruntime", claim="engine",
    ),
    Rung(
        name="custom kernels", summary="fused attention and item head of our own, fp32 on OpenVINO",
        runtime="engine", backend="openvino", claim="custom kernels",
    ),
    Rung(
        name="bf16", summary="the same in bf16 (fp16: no CPU here computes in it)",
        runtime="engine", backend="openvino", precision="bf16",
    ),
    Rung(name="int8", summary="the same in int8", runtime="engine", backend="openvino", precision="int8"),
    Rung(
        name="vLLM, cold", summary="vLLM's CPU build with our attention on its pages; nothing cached",
        runtime="vllm", backend="vllm", claim="vLLM",
    ),
    Rung(
        name="vLLM, prefix cached", summary=f"a user who comes back with {NEW_EVENTS} new events",
        runtime="vllm", backend="vllm", entry="extend",
    ),
    Rung(
        name="hot user", summary=f"a user who comes back with {NEW_EVENTS} new events: the state is there, fp32",
        runtime="engine", backend="openvino", entry="extend", claim="cache",
    ),
    Rung(
        name="hot user, int8", summary="the same in int8",
        runtime="engine", backend="openvino", precision="int8", entry="extend", claim="cache",
    ),
)  # fmt: skip


def climb(workspace: Workspace, case_name: str, *, seconds: float = 6.0) -> dict[str, Any]:
    """`reports/ladder.json` has every rung of the case's model; what it says.

    `seconds` of each cell, all runtimes together. A rung whose runtime is not here is in `missing` with the reason.
    """
    from stages.measure.environment import describe_environment

    with hold(workspace.artifacts):
        bundle = open_artifact(workspace.artifacts / "bundle", stage="bundle")
        case = find_case(case_name)
        session, wanted = _session(case, bundle.path, seconds)
        rows = _measure(session, wanted)
    found, missing = rungs_of(rows, session.skipped)
    report = {
        "schema": SCHEMA,
        "bundle": bundle.id,
        "case": case.name,
        "model": case.summary,
        "batch": BATCH,
        "occupancy": OCCUPANCY,
        "new_events": NEW_EVENTS,
        "environment": describe_environment() | {"calibration_ms": round(session.calibration_ms[0], 3)},
        "rungs": found,
        "missing": missing,
    }
    write_report(workspace.reports / FILE, report)
    return report


def _session(case: Case, bundle: Path, seconds: float) -> tuple[Session, list[Contestant]]:
    from hstu.config import HSTUConfig
    from stages.measure import case_models
    from stages.measure.contestants import Compiling, contestants
    from stages.measure.interleave import Effort
    from stages.measure.session import Session

    refused: dict[str, str] = {}
    if case.config is None:
        files = case_models.bundle_files(bundle)
    else:
        files, refused = case_models.random_files(case, bundle, bundle.parent / case_models.FOLDER)
    config = HSTUConfig.from_pretrained(files.checkpoint)
    files = dataclasses.replace(files, bundle=_model_folder(files, config))
    eager = next(c for c in contestants(files) if c.runtime == EAGER)
    candidates = [*contestants(files), dataclasses.replace(eager, runtime="torch-features")]
    wanted = [next((c for c in candidates if rung.is_of(c)), None) for rung in RUNGS]
    session = Session(
        case=case,
        config=config,
        contestants=list(dict.fromkeys(c for c in wanted if c is not None)),
        effort=Effort(
            cell_seconds=seconds, min_rounds=7, max_rounds=80, first_answer_s=240.0,
            compiling=Compiling(batches=(), threads=()),
        ),
        seed=0,
        on_cell=lambda found: say(f"ladder: {found.cell}: {len(found.measurements)} runtimes"),
    )  # fmt: skip
    session.skipped += [
        {"case": case.name, "runtime": "engine", "backend": "", "precision": name, "reason": why}
        for name, why in refused.items()
    ]
    return session, list(session.contestants)


def _model_folder(files: ModelFiles, config: Any) -> Path:
    """A folder that vLLM takes: the bundle, or the checkpoint of a random model with a tokenizer beside it."""
    if files.bundle is not None:
        return files.bundle
    from serving.vllm_plugin.tokenizer import write_tokenizer

    folder = files.checkpoint.parent / "vllm"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            (folder / name).hardlink_to(files.checkpoint / name)
    write_tokenizer(folder, config)
    return folder


def _measure(session: Session, wanted: Sequence[Contestant]) -> list[dict[str, Any]]:
    """The rows of all cells: one user and a batch, who is new and who comes back."""
    import numpy as np

    from stages.measure.interleave import measure_cell
    from stages.measure.rows import result_rows

    rng = np.random.default_rng(session.seed)
    weights_bytes = (wanted[0].checkpoint / "model.safetensors").stat().st_size
    rows: list[dict[str, Any]] = []
    for entry in ("retrieve", "extend"):
        having = [c for c in wanted if c.runtime == EAGER or any(r.entry == entry and r.is_of(c) for r in RUNGS)]
        with session.opened(having, threads=1) as (workers, roof):
            session.calibration_ms.append(roof.call("calibration_ms"))
            for batch, occupancy in ((1, 1.0), (BATCH, OCCUPANCY)):
                cell = Cell(
                    case=session.case.name, entry=entry, batch=batch, length=session.config.max_history,
                    occupancy=occupancy, thread_mode="one", new_events=NEW_EVENTS if entry == "extend" else 0,
                )  # type: ignore[arg-type] # fmt: skip
                found = measure_cell(workers, None, session.config, session.case, cell, session.effort, rng)
                for worker in [worker for worker in workers if worker.contestant in found.broken]:
                    session.skip(worker, found.broken[worker.contestant])
                    workers.remove(worker)
                session.on_cell(found)
                rows += result_rows(
                    found, session.config, threads=1, weights_bytes=weights_bytes, baselines_mib=session.baselines_mib
                )
    return rows


def rungs_of(
    rows: Sequence[Mapping[str, Any]], skipped: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The rungs that were measured, in their order, with what each is worth; and the others with the reason."""
    found: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    for rung in RUNGS:
        named = {"runtime": rung.runtime, "backend": rung.backend, "precision": rung.precision}
        own = [row for row in rows if row["entry"] == rung.entry and all(row[k] == v for k, v in named.items())]
        if not own:
            why = [s["reason"] for s in skipped if s["runtime"] == rung.runtime and s["precision"] == rung.precision]
            missing.append({"rung": rung.name, "reason": str(why[0]).splitlines()[0] if why else "not in the bundle"})
            continue
        one, many = (next(row for row in own if row["batch"] == batch) for batch in (1, BATCH))
        beside = [row for row in rows if row["entry"] == rung.entry and row["runtime"] == EAGER]
        found.append(
            {
                "rung": rung.name,
                "summary": rung.summary,
                "claim": rung.claim,
                **named,
                "entry": rung.entry,
                "one_user": {name: one[name] for name in FIGURES},
                "batch": {name: many[name] for name in FIGURES},
                "memory_to_eager": _memory(many, next(row for row in beside if row["batch"] == BATCH)),
            }
        )
    if not found:
        raise InputError("no rung of the ladder was measured", got=str(missing), fix="python cli.py compile")
    return found, missing


def _memory(row: Mapping[str, Any], eager: Mapping[str, Any]) -> float | None:
    if row["peak_memory_mib"] is None or not eager["peak_memory_mib"]:
        return None
    return float(round(row["peak_memory_mib"] / eager["peak_memory_mib"], 3))
