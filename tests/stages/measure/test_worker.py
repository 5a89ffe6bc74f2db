"""A runtime in a process of its own: it answers, is timed, dies and hangs."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hstu.errors import ArtifactError
from stages.entry_check import worst_error
from stages.measure.case_models import bundle_files
from stages.measure.contestants import Contestant, contestants
from stages.measure.runtimes import CompiledEngine
from stages.measure.worker import Worker, WorkerError
from tests.models import TINY
from tests.stages.measure.requests import request


@pytest.fixture
def engine(artifacts: Path) -> Iterator[Worker]:
    (contestant,) = [c for c in contestants(bundle_files(artifacts / "bundle")) if c.runtime == "engine"]
    worker = Worker(contestant, threads=1)
    yield worker
    worker.close()


def test_a_worker_answers_times_and_measures_its_memory(engine: Worker) -> None:
    opened = engine.receive(timeout_s=60)
    assert 10 < opened["baseline_mib"] < 500
    asked = request()
    assert engine.call("answer", "retrieve", asked)["user_embedding"].shape == (2, TINY.embedding_dim)
    engine.call("settle")
    seconds, waited = engine.call("time", "retrieve", [asked] * 3, wake=True)
    assert len(seconds) == 3
    assert all(0 < value < 5 for value in seconds)
    assert waited >= 0
    assert 0 < engine.call("peak_mib") < 200


def test_every_runtime_keeps_the_memory_it_frees(engine: Worker) -> None:
    """Otherwise a ratio to eager PyTorch would measure how glibc gives memory back."""
    environment = Path(f"/proc/{engine.pid}/environ").read_bytes().split(b"\0")
    assert {b"MALLOC_MMAP_MAX_=0", b"OMP_NUM_THREADS=1"} <= set(environment)
    assert any(value.startswith(b"MALLOC_TRIM_THRESHOLD_=") for value in environment)


def test_an_engine_answers_a_returning_user_from_the_state_of_the_visit_before(engine: Worker) -> None:
    engine.receive(timeout_s=60)
    asked = request()
    whole, returning = engine.call("answer", "retrieve", asked), engine.call("answer", "extend", asked)
    assert set(returning) == set(whole)
    assert worst_error(whole, returning) <= 1e-5
    assert len(engine.call("time", "extend", [asked] * 2, wake=True)) == 2


def test_a_returning_user_costs_an_engine_the_new_events_alone(artifacts: Path) -> None:
    runtime = CompiledEngine(artifacts / "bundle" / "engines" / "fp32", 1)
    seen: list[tuple[str, int]] = []
    run = runtime.engine.run

    def counted(entry: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
        seen.append((entry, feeds["item_ids"].shape[1]))
        return run(entry, feeds)

    runtime.engine.run = counted  # type: ignore[method-assign]
    returning = dataclasses.replace(request(batch=1), new_events=10)
    runtime.remember(returning)
    seen.clear()
    runtime.answer("extend", returning)
    assert seen == [("extend", 11)]  # ten new events, and the one that had no successor


def test_an_error_of_ours_crosses_the_process_as_itself(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{}")
    contestant = Contestant(
        runtime="engine", backend="onnxruntime", precision="fp32", folder=tmp_path, checkpoint=artifacts / "checkpoint"
    )
    worker = Worker(contestant, threads=1)
    with pytest.raises(ArtifactError, match="not an engine"):
        worker.receive(timeout_s=60)
    worker.close()


def test_a_worker_that_dies_or_hangs_is_named_with_what_it_wrote(engine: Worker) -> None:
    engine.receive(timeout_s=60)
    engine.send("no_such_method")
    with pytest.raises(WorkerError, match=r"(?s)engine onnxruntime fp32: its process ended.*no_such_method"):
        engine.receive(timeout_s=60)


def test_a_killed_worker_is_an_error(engine: Worker) -> None:
    engine.receive(timeout_s=60)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"exit status -9"):
        engine.call("peak_mib")


def test_a_worker_that_takes_too_long_is_ended(engine: Worker) -> None:
    with pytest.raises(WorkerError, match=r"no answer within 0.001 s"):
        engine.receive(timeout_s=0.001)
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)
