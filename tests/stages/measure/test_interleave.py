"""Runtimes take turns on the same requests; wrong ones are never timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.engine import Array
from stages.measure.contestants import Compiling, Contestant, takes_part
from stages.measure.interleave import measure_cell
from stages.measure.requests import Request
from tests.models import TINY
from tests.stages.measure.requests import CASE, EFFORT, answers, cell


class Recorder:
    """Stands where a worker stands and writes down what it is asked; answers as eager PyTorch would."""

    def __init__(self, runtime: str, log: list[tuple[str, str, int]], wrong: bool = False) -> None:
        folder = Path("nowhere")
        self.contestant = Contestant(
            runtime=runtime,
            backend="b",
            precision="fp32",
            folder=folder,
            checkpoint=folder,  # type: ignore[arg-type]
        )
        self.log, self.wrong = log, wrong

    def send(self, method: str, entry: str, asked: Request) -> None:
        self.log.append((self.contestant.runtime, method, id(asked)))

    def receive(self, *, timeout_s: float) -> dict[str, Array]:
        return answers(seed=1 if self.wrong else 0)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        seen: Sequence[Request] = arguments[1] if method == "time" else []
        self.log.append((self.contestant.runtime, method, id(seen[0]) if seen else 0))
        rates = {"fp32": 1e-3}, {"fp32": "NumPy"}
        return {"time": ([0.5] * len(seen), 0.1 * len(seen)), "settle": None, "peak_mib": 12.0, "gflops": rates}[method]


def test_runtimes_take_turns_on_the_same_fresh_requests_and_wrong_ones_have_none() -> None:
    log: list[tuple[str, str, int]] = []
    workers = [Recorder("torch-eager", log), Recorder("onnx-plain", log, wrong=True), Recorder("engine", log)]
    found = measure_cell(
        workers,  # type: ignore[arg-type]
        Recorder("gemm", log),  # type: ignore[arg-type]
        TINY,
        CASE,
        cell(batch=2),
        dataclasses.replace(EFFORT, cell_seconds=9.0),
        np.random.default_rng(0),
    )
    timed = [entry for entry in log if entry[1] == "time"][1:]  # the first tells how long a request takes
    assert [runtime for runtime, _, _ in timed] == ["torch-eager", "engine"] * 3
    assert all(first[2] == second[2] for first, second in zip(timed[::2], timed[1::2], strict=True))
    assert [(m.contestant.runtime, m.check.correct, len(m.seconds)) for m in found.measurements] == [
        ("torch-eager", True, 3), ("onnx-plain", False, 0), ("engine", True, 3),
    ]  # fmt: skip
    assert found.measurements[2].ratios(found.measurements[0]) == [1.0] * 3
    assert found.measurements[2].wait_share == pytest.approx(0.2)
    assert found.gflops == {"fp32": [1e-3] * 3}
    assert not found.broken
    first_time = next(index for index, entry in enumerate(log) if entry[1] == "time")
    assert all(entry[1] in ("answer", "settle") for entry in log[:first_time])
    turns = [runtime for runtime, method, _ in log[first_time + 1 :] if method in ("time", "gflops")]
    assert turns == ["torch-eager", "engine", "gemm"] * 3


def test_torch_compile_takes_part_where_its_compilation_pays() -> None:
    folder = Path("nowhere")
    compiled = Contestant(
        runtime="torch-compile", backend="inductor", precision="fp32", folder=folder, checkpoint=folder
    )
    worth = Compiling(batches=(1,), threads=("all",))
    points = [
        cell(batch=1, thread_mode="all"),
        cell(batch=8, thread_mode="all"),
        cell(batch=1),
        cell(entry="rank", batch=1),
    ]
    assert [takes_part(compiled, TINY, point, worth) for point in points] == [True, False, False, False]
    both = Compiling(batches=(1,), threads=("one", "all"))
    assert [takes_part(compiled, TINY, point, both) for point in points] == [True, False, True, False]
