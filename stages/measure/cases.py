"""THE registry of benchmark cases: which model, which entries, at which batch sizes and lengths."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hstu.config import TASKS, HSTUConfig
from hstu.errors import ParameterError

BenchmarkEntry = Literal["retrieve", "rank", "extend", "generate"]
ThreadMode = Literal["one", "all"]
SLATE = 10  # items of a generated slate
PORTABLE = "The portable engines: fp16, a shipping format that no CPU here computes in, and fp32 on ONNX Runtime."


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model and the requests it is measured with. `config` None is the bundle's own checkpoint.

    `extend` is a returning user: the newest `new_events` events of a history are new, and an engine has the user's
    state. Runtimes that keep none compute the whole history again, eager PyTorch among them.

    Every other case is a model of random weights, compiled with the parameters that the bundle was compiled with.
    """

    name: str
    summary: str
    config: HSTUConfig | None
    entries: tuple[BenchmarkEntry, ...] = ("retrieve", "rank")
    batches: tuple[int, ...] = (1, 8, 32)
    occupancies: tuple[float, ...] = (1.0, 0.5)  # real events per padded position
    new_events: tuple[int, ...] = (10, 1)  # of a returning user
    candidates: int = 128  # per user, of the rank entry
    check_users: int = 32  # answers compared with eager PyTorch before a cell is timed
    calibration: int = 32  # drawn histories, of a model of random weights: half fit the scales, half judge them
    evaluation: int = 32  # drawn histories that its engines are gated on: each runs through eager PyTorch
    engines: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8", "fp32-onnxruntime")  # as far as the bundle has them
    padded: tuple[str, ...] = ()  # engines built a second time with padding, for batches that are not full
    left_out: str = ""  # what is not measured, and why


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of the benchmark: every runtime is measured on it in the same interleaved rounds."""

    case: str
    entry: BenchmarkEntry
    batch: int
    length: int
    occupancy: float
    thread_mode: ThreadMode
    new_events: int = 0  # of a returning user; 0 for every other entry

    def __str__(self) -> str:
        threads = "one thread" if self.thread_mode == "one" else "all threads"
        new = f" {self.new_events} new" if self.new_events else ""
        return f"{self.case} {self.entry}{new} B={self.batch} L={self.length} {self.occupancy:.0%} {threads}"


def _ranking(**shape: int) -> HSTUConfig:
    """Meta's research model of a shape, with task heads so that it can rank."""
    return HSTUConfig(tasks=TASKS, head_dim=128, **shape)  # type: ignore[arg-type]


def _reference(length: int, **changes: Any) -> Case:
    """Meta's research model at its largest, as it is: no task heads, so it does not rank."""
    return Case(
        name=f"reference-{length}",
        summary=f"d=1024, 12 layers, 16 heads, 50 000 items, L={length}, random weights",
        config=HSTUConfig(
            num_items=50_000, embedding_dim=1024, num_layers=12, num_heads=16, qk_dim=64, v_dim=64, max_history=length
        ),
        entries=("retrieve", "extend"),
        engines=("fp32", "bf16", "int8"),
        **changes,
    )


CASES: tuple[Case, ...] = (
    Case(
        name="trained",
        summary="the bundle's own checkpoint",
        config=None,
        entries=("retrieve", "rank", "generate"),
    ),
    Case(
        name="small",
        summary="d=256, 4 layers, 4 heads, 10 000 items, L=200, random weights",
        config=_ranking(
            num_items=10_000, embedding_dim=256, num_layers=4, num_heads=4, qk_dim=64, v_dim=64, max_history=200
        ),
        entries=("retrieve", "rank", "extend"),
    ),
    Case(
        name="deep-512",
        summary="d=256, 12 layers, 4 heads, 10 000 items, L=512, random weights: for loads of a deep model",
        config=HSTUConfig(
            num_items=10_000, embedding_dim=256, num_layers=12, num_heads=4, qk_dim=64, v_dim=64, max_history=512
        ),
        entries=("retrieve", "extend"),
        batches=(1, 8),
        check_users=8,
        calibration=16,
        evaluation=16,
        engines=("fp32",),
        left_out="Other precisions: it is there to be served.",
    ),
    _reference(
        512,
        batches=(1, 8, 32),
        occupancies=(1.0, 0.57, 0.5),
        padded=("fp32",),
        check_users=8,
        calibration=16,
        evaluation=8,
        left_out=PORTABLE,
    ),
    _reference(
        2048,
        batches=(1,),
        check_users=2,
        calibration=4,
        evaluation=2,
        left_out="Batches of 8 and 32: eager PyTorch and the plain export hold several copies of the scores at once, "
        "2 GiB each at batch 8, more than 24 GiB for all runtimes together. The portable engines, as in reference-512.",
    ),
    Case(
        name="ml-20m-large",
        summary="d=256, 16 layers, 8 heads, 131 262 items, L=200, random weights",
        config=_ranking(
            num_items=131_262, embedding_dim=256, num_layers=16, num_heads=8, qk_dim=32, v_dim=32, max_history=200
        ),
        check_users=8,
        calibration=16,
        evaluation=16,
        engines=("fp32", "bf16", "int8"),
        left_out=PORTABLE,
    ),
)


def find_case(name: str, cases: Sequence[Case] = CASES) -> Case:
    """The case of that name; ParameterError naming the known ones when there is none."""
    for case in cases:
        if case.name == name:
            return case
    raise ParameterError(f"benchmark: there is no case {name!r}", expected=", ".join(case.name for case in cases))


def cells(case: Case, config: HSTUConfig, entries: Collection[str], mode: ThreadMode) -> list[Cell]:
    """The cells of a case on one thread or on all, `entries` being those that the model and its runtimes have.

    A single user is never padded, so batch 1 knows no occupancy; one thread is measured at batch 1 (the cost
    of an answer on one core), a slate at full length, a returning user alone.
    """
    found = []
    for entry, batch, occupancy in itertools.product(case.entries, case.batches, case.occupancies):
        padded = batch > 1 and entry == "retrieve"
        if (
            entry in entries
            and (entry != "extend" or batch == 1)
            and (occupancy == 1.0 or padded)
            and (mode == "all" or (batch == 1 and entry != "generate"))
        ):
            for new_events in case.new_events if entry == "extend" else (0,):
                found.append(
                    Cell(
                        case=case.name,
                        entry=entry,
                        batch=batch,
                        length=config.max_history,
                        occupancy=occupancy,
                        thread_mode=mode,
                        new_events=new_events,
                    )
                )
    return found
