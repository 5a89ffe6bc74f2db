"""THE registry of benchmark cases: which model, which entries, at which batch sizes and lengths."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from hstu.config import TASKS, HSTUConfig
from hstu.errors import ParameterError

BenchmarkEntry = Literal["retrieve", "rank", "extend", "generate"]
ThreadMode = Literal["one", "all"]
SLATE = 10  # items of a generated slate


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model and the requests it is measured with. `config` None is the bundle's own checkpoint.

    `extend` is a returning user: the newest 10 events of a history are new, and an engine has the user's state.
    Runtimes that keep none compute the whole history again, eager PyTorch among them.

    Every other case is a model of random weights, compiled with the parameters that the bundle was compiled with.
    """

    name: str
    summary: str
    config: HSTUConfig | None
    entries: tuple[BenchmarkEntry, ...] = ("retrieve", "rank")
    batches: tuple[int, ...] = (1, 8, 32)
    occupancies: tuple[float, ...] = (1.0, 0.5)  # real events per padded position
    candidates: int = 128  # per user, of the rank entry
    check_users: int = 32  # answers compared with eager PyTorch before a cell is timed


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of the benchmark: every runtime is measured on it in the same interleaved rounds."""

    case: str
    entry: BenchmarkEntry
    batch: int
    length: int
    occupancy: float
    thread_mode: ThreadMode

    def __str__(self) -> str:
        threads = "one thread" if self.thread_mode == "one" else "all threads"
        return f"{self.case} {self.entry} B={self.batch} L={self.length} {self.occupancy:.0%} {threads}"


def _plain(**shape: int) -> HSTUConfig:
    """Meta's research model of a shape, with task heads so that it can rank."""
    return HSTUConfig(tasks=TASKS, head_dim=128, **shape)  # type: ignore[arg-type]


def _reference(length: int, batches: tuple[int, ...], check_users: int) -> Case:
    return Case(
        name=f"reference-{length}",
        summary=f"d=1024, 12 layers, 16 heads, 50 000 items, L={length}, random weights",
        config=_plain(
            num_items=50_000, embedding_dim=1024, num_layers=12, num_heads=16, qk_dim=64, v_dim=64, max_history=length
        ),
        entries=("retrieve", "extend"),
        batches=batches,
        check_users=check_users,
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
        config=_plain(
            num_items=10_000, embedding_dim=256, num_layers=4, num_heads=4, qk_dim=64, v_dim=64, max_history=200
        ),
        entries=("retrieve", "rank", "extend"),
    ),
    _reference(512, (1, 8, 32), check_users=8),
    _reference(2048, (1, 8), check_users=2),
    Case(
        name="ml-20m-large",
        summary="d=256, 16 layers, 8 heads, 131 262 items, L=200, random weights",
        config=_plain(
            num_items=131_262, embedding_dim=256, num_layers=16, num_heads=8, qk_dim=32, v_dim=32, max_history=200
        ),
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
            found.append(
                Cell(
                    case=case.name,
                    entry=entry,
                    batch=batch,
                    length=config.max_history,
                    occupancy=occupancy,
                    thread_mode=mode,
                )
            )
    return found
