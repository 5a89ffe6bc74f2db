"""The benchmark: answers are checked before they are timed, runtimes take turns, wrong ones are never timed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from hstu.artifact import Artifact, encode_json, open_artifact
from hstu.checkpoints.huggingface import save_pretrained
from hstu.errors import ArtifactError, GateError, ParameterError
from hstu.model import history_from_feeds
from serving.engine import Array
from serving.slate import greedy_slate
from stages import benchmark
from stages.benchmark import merge
from stages.contract import Workspace, execute
from stages.entry_check import worst_error
from stages.measure import process
from stages.measure.case_models import bundle_files, compiler_sources, random_files
from stages.measure.cases import CASES, SLATE, Cell, cells, find_case
from stages.measure.ceiling import answer_flops, least_memory_mib
from stages.measure.check import Check, check_answers
from stages.measure.contestants import Compiling, Contestant, contestants, takes_part
from stages.measure.gemm import LARGE, LIBRARIES, Roof
from stages.measure.interleave import Effort, Found, Measurement, measure_cell
from stages.measure.requests import Request, draw_lengths, draw_request
from stages.measure.rows import result_rows
from stages.measure.runtimes import CompiledEngine, Eager
from stages.measure.session import Choice, Session
from stages.measure.statistics import latency_ms, median_with_interval
from stages.measure.worker import Worker, WorkerError
from tests.models import TINY, random_model, tiny_config
from tests.stages.bundles import rewrite, write_artifacts

EFFORT = Effort(
    cell_seconds=0.01, min_rounds=2, max_rounds=3, first_answer_s=60.0, compiling=Compiling(batches=(), threads=())
)
CASE = dataclasses.replace(find_case("trained"), entries=("retrieve", "rank"), batches=(1, 3), check_users=4)


def cell(**changes: Any) -> Cell:
    values: dict[str, Any] = {"case": "trained", "entry": "retrieve", "batch": 2, "length": 20, "occupancy": 1.0}
    return Cell(**values | {"thread_mode": "one"} | changes)


def request(entry: str = "retrieve", *, batch: int = 2, seed: int = 0) -> Request:
    drawn = cell(entry=entry, batch=batch, occupancy=0.5)
    return draw_request(TINY, drawn, np.random.default_rng(seed), candidates=5)


# ── the registry and the requests ──


def test_an_unknown_case_names_the_known_ones() -> None:
    with pytest.raises(ParameterError, match="trained, small, reference-512, reference-2048, ml-20m-large"):
        find_case("big")


def test_cases_are_the_models_they_are_called_after() -> None:
    shapes = {case.name: case.config for case in CASES if case.config}
    reference = shapes["reference-2048"]
    assert (reference.embedding_dim, reference.num_layers, reference.num_heads) == (1024, 12, 16)
    assert (reference.num_items, reference.max_history) == (50_000, 2048)
    large = shapes["ml-20m-large"]
    assert (large.num_layers, large.num_heads, large.qk_dim, large.max_length) == (16, 8, 32, 211)
    assert shapes["small"].uvqk_dim == 4 * 256


def test_cells_cover_batches_and_occupancies_on_all_threads_and_one_user_on_one() -> None:
    found = cells(find_case("small"), TINY, ("retrieve", "rank"), "all")
    points = [(c.entry, c.batch, c.occupancy) for c in found]
    retrieve = [("retrieve", 1, 1.0), ("retrieve", 8, 1.0), ("retrieve", 8, 0.5), ("retrieve", 32, 1.0)]
    assert points == [*retrieve, ("retrieve", 32, 0.5), ("rank", 1, 1.0), ("rank", 8, 1.0), ("rank", 32, 1.0)]
    assert [c.batch for c in cells(find_case("small"), TINY, ("retrieve",), "one")] == [1]
    for mode in ("one", "all"):
        returning = cells(find_case("small"), TINY, ("extend",), mode)  # type: ignore[arg-type]
        assert [(c.batch, c.occupancy, c.new_events) for c in returning] == [(1, 1.0, 10), (1, 1.0, 1)]
    assert not cells(find_case("trained"), TINY, ("generate",), "one")
    assert all(c.length == TINY.max_history for c in found)


@pytest.mark.parametrize(("batch", "occupancy"), [(1, 1.0), (8, 1.0), (8, 0.5), (32, 0.5), (2, 0.5)])
def test_lengths_have_the_occupancy_and_one_full_history(batch: int, occupancy: float) -> None:
    rng = np.random.default_rng(1)
    drawn = np.concatenate([draw_lengths(batch, 200, occupancy, rng) for _ in range(300)])
    assert set(drawn[::batch]) == {200}
    assert drawn.min() >= 1
    assert drawn.max() <= 200
    assert drawn.mean() / 200 == pytest.approx(occupancy, abs=0.02)


def test_requests_differ_from_round_to_round_and_not_from_run_to_run() -> None:
    first, again, other = request(seed=1), request(seed=1), request(seed=2)
    assert all(np.array_equal(first.feeds[name], again.feeds[name]) for name in first.feeds)
    assert not np.array_equal(first.feeds["item_ids"], other.feeds["item_ids"])
    assert first.feeds["item_ids"].shape == (2, 20)
    assert request("rank").feeds["candidate_ids"].shape == (2, 5)


# ── figures ──


def test_percentiles_are_milliseconds() -> None:
    assert latency_ms([0.001 * n for n in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


def test_the_interval_holds_the_median_and_narrows_with_rounds() -> None:
    rng = np.random.default_rng(0)
    few, many = (rng.normal(2.0, 0.2, size=count) for count in (9, 900))
    (few_median, few_interval), (_, many_interval) = median_with_interval(few), median_with_interval(many)
    assert few_interval[0] <= few_median <= few_interval[1]
    assert many_interval[0] < 2.0 < many_interval[1]
    assert many_interval[1] - many_interval[0] < 0.3 * (few_interval[1] - few_interval[0])


@pytest.mark.parametrize("entry", ["retrieve", "rank"])
def test_the_work_of_one_event_is_what_pytorch_counts(entry: str) -> None:
    model = random_model()
    drawn = draw_request(TINY, cell(entry=entry, batch=1, length=1), np.random.default_rng(0), candidates=7)
    feeds = {name: torch.as_tensor(value) for name, value in drawn.feeds.items()}
    with FlopCounterMode(display=False) as counter:
        if entry == "rank":
            model.rank(history_from_feeds(feeds), feeds["candidate_ids"])
        else:
            model.retrieve(history_from_feeds(feeds))
    qk, hv = TINY.num_heads * TINY.qk_dim, TINY.num_heads * TINY.v_dim
    counted = float(counter.get_total_flops())
    if entry == "rank":
        # eager projects the last layer's event whole, of which queries and gate are not read; a candidate's score
        # with itself, and attention to one event, are element-wise and not counted
        counted += -2 * TINY.embedding_dim * (qk + hv) + (TINY.num_layers - 1) * 2 * hv
        counted += 7 * TINY.num_layers * 2 * (qk + hv + hv)
    else:
        counted += TINY.num_layers * 2 * hv  # attention to one event is element-wise
    assert answer_flops(TINY, [1], entry=entry, candidates=7) == counted


def test_padding_is_no_work_and_the_attention_is_half() -> None:
    one, two = (answer_flops(TINY, lengths, entry="retrieve", candidates=1) for lengths in ([20], [20, 1]))
    assert one < two < 1.5 * one
    model = random_model()
    drawn = draw_request(TINY, cell(batch=1), np.random.default_rng(0), candidates=1)
    with FlopCounterMode(display=False) as counter:
        model.retrieve(history_from_feeds({name: torch.as_tensor(value) for name, value in drawn.feeds.items()}))
    assert 0.5 * counter.get_total_flops() < one < counter.get_total_flops()


def test_the_roof_is_the_fastest_product_of_every_precision() -> None:
    config = dataclasses.replace(TINY, embedding_dim=64)
    roof = Roof(config, threads=1)
    assert set(roof.gflops()) == {"fp32", "bf16", "int8"}
    for precision, product in roof.best.items():
        assert product.library in LIBRARIES[precision]
        shapes = {(64, TINY.uvqk_dim), (TINY.num_heads * TINY.v_dim, 64), LARGE[1:]}
        assert (product.inner, product.columns) in shapes
    # Beyond what one core can do: 512-bit units, two multiply-adds a clock, 8 GHz, int8 four times that.
    assert 1 < roof.gflops()["fp32"] < 1024
    assert 1 < roof.gflops()["int8"] < 4096


def test_every_library_multiplies_in_every_precision_that_it_is_asked_for() -> None:
    for libraries in LIBRARIES.values():
        for make in libraries.values():
            make(3, 16, 32, 1)()


def found_with(seconds: Mapping[str, list[float]], gflops: Mapping[str, list[float]], flops: float) -> Found:
    """A cell on which each runtime took so long in each round."""
    folder = Path("nowhere")
    right = Check(correct=True, max_abs_error=0.0, top10_overlap=1.0)
    measurements = []
    for runtime, values in seconds.items():
        contestant = Contestant(
            runtime=runtime,
            backend="b",
            precision="fp32",
            folder=folder,
            checkpoint=folder,  # type: ignore[arg-type]
        )
        item = Measurement(contestant=contestant, check=right, seconds=values, medians=values, peak_mib=24.0)
        measurements.append(item)
    return Found(
        cell=cell(batch=1), measurements=measurements, flops=flops, gflops=dict(gflops), products={"fp32": "X 1x2x3"}
    )


def test_the_share_is_of_the_products_of_the_same_rounds_and_ratios_are_round_by_round() -> None:
    found = found_with(
        {"torch-eager": [2.0, 4.0, 2.0], "onnx-plain": [1.0, 2.0, 1.0], "engine": [0.5, 1.0, 0.5]},
        {"fp32": [20.0, 10.0, 20.0]},  # the machine was slow in the second round, for all alike
        flops=9e9,
    )
    baselines = {item.contestant: 50.0 for item in found.measurements}
    rows = result_rows(found, TINY, threads=1, weights_bytes=2**20, baselines_mib=baselines)
    engine = rows[2]
    assert (engine["ratio_to_eager"], engine["ratio_to_plain"]) == (4.0, 2.0)
    assert rows[1]["ratio_to_plain"] == 1.0
    assert engine["share_of_ceiling"] == pytest.approx(9 / 0.5 / 20)
    assert (engine["ceiling_gflops"], engine["ceiling_product"]) == (20.0, "X 1x2x3")
    least = least_memory_mib(TINY, 2**20, batch=1, length=20)
    assert engine["memory_ratio"] == pytest.approx(24.0 / least, rel=0.01)


def test_the_least_memory_is_the_weights_once_and_one_layer_of_activations() -> None:
    config = find_case("reference-512").config
    assert config is not None
    weights = 4 * (12 * 1024 * 5 * 1024 + 50_001 * 1024)
    activations = 4 * (512 * (2048 + 4096 + 1024) + 50_000)
    assert least_memory_mib(config, weights, batch=1, length=512) == pytest.approx((weights + activations) / 2**20)
    twice = least_memory_mib(config, weights, batch=2, length=512)
    assert twice == pytest.approx((weights + 2 * activations) / 2**20)


@pytest.mark.slow
def test_no_product_of_the_roof_exceeds_it(tmp_path: Path) -> None:
    """An "engine" that is nothing but the products themselves has a share of about 100 %, and never much more."""
    roof = Roof(find_case("small").config, threads=1)  # type: ignore[arg-type]
    for precision, product in roof.best.items():
        rates, own = [], []
        for _ in range(7):
            rates.append(roof.gflops()[precision])
            own.append(product.gflops(1))
        assert float(np.median(own)) / float(np.median(rates)) < 1.1


def test_the_peak_of_memory_is_seen_after_it_has_gone() -> None:
    process.reset_peak()
    before = process.peak_mib()
    block = np.ones(100 * 2**20 // 8)
    del block
    assert 90 < process.peak_mib() - before < 140
    process.reset_peak()
    assert process.peak_mib() - before < 60


def test_waiting_for_a_core_is_seen() -> None:
    """Two processes on one core: each waits about half of the time, alone hardly any of it."""
    cores = os.sched_getaffinity(0)
    code = "while True: pass"
    try:
        os.sched_setaffinity(0, {min(cores)})
        rival = subprocess.Popen([sys.executable, "-c", code])  # inherits the one core
        try:
            started, before = time.perf_counter(), process.core_wait_s()
            while time.perf_counter() - started < 0.5:
                pass
            share = (process.core_wait_s() - before) / (time.perf_counter() - started)
        finally:
            rival.kill()
            rival.wait()
    finally:
        os.sched_setaffinity(0, cores)
    assert 0.2 < share < 2.0


def test_a_spinning_thread_is_waited_for() -> None:
    assert process.wait_until_idle(1.0)
    code = """
import sys, threading, time
from stages.measure import process
stop = time.monotonic() + 0.3
def spin():
    while time.monotonic() < stop:
        pass
thread = threading.Thread(target=spin)
thread.start()
print(process.wait_until_idle(0.05), process.wait_until_idle(5.0), time.monotonic() >= stop)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


# ── right or wrong ──


def answers(seed: int = 0) -> dict[str, Array]:
    model = random_model()
    feeds = {name: torch.as_tensor(value) for name, value in request(seed=seed).feeds.items()}
    embedding, items, scores = model.retrieve(history_from_feeds(feeds))
    return {"user_embedding": embedding.numpy(), "top_item_ids": items.numpy(), "top_scores": scores.numpy()}


@pytest.mark.parametrize(
    ("precision", "error", "correct"),
    [
        ("fp32", 1e-6, True),
        ("fp32", 1e-4, False),
        ("bf16", 1e-3, True),
        ("int8", 0.2, False),
        ("fp32", math.nan, False),
    ],
)
def test_answers_are_held_to_the_tolerance_of_their_precision(precision: str, error: float, correct: bool) -> None:
    expected = answers()
    got = {name: value.copy() for name, value in expected.items()}
    got["user_embedding"][1, 3] += error
    found = check_answers(cell(), precision, [expected], [got], [])
    assert found.correct is correct
    assert found.top10_overlap == 1.0


def test_wrong_items_are_wrong_although_their_scores_are_right() -> None:
    expected = answers()
    got = expected | {"top_item_ids": answers(seed=1)["top_item_ids"]}
    found = check_answers(cell(), "fp32", [expected], [got], [])
    assert not found.correct
    assert found.top10_overlap is not None
    assert found.top10_overlap < 1.0


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Eager:
    folder = tmp_path_factory.mktemp("eager")
    save_pretrained(random_model(), folder)
    return Eager(folder, threads=1)


def test_greedy_slates_fall_short_by_nothing_and_others_by_what_they_miss(eager: Eager) -> None:
    asked = request(batch=3)
    slates = eager.answer("generate", asked)["slates"]
    history = history_from_feeds({name: torch.as_tensor(value) for name, value in asked.feeds.items()})
    assert np.array_equal(slates, greedy_slate(eager.engine.model, history, SLATE)[0].numpy())
    assert eager.slate_error(asked, slates) < 1e-6
    swapped = slates.copy()
    swapped[1, [0, 1]] = swapped[1, [1, 0]]
    shortfall = greedy_slate(eager.engine.model, history, SLATE)[1].numpy()
    assert eager.slate_error(asked, swapped) > 1e-4
    assert shortfall.shape == (3, SLATE)
    repeated = slates.copy()
    repeated[2, 5] = repeated[2, 4]
    assert eager.slate_error(asked, repeated) == math.inf
    assert not check_answers(
        cell(entry="generate"), "fp32", [{"slates": slates}], [{"slates": repeated}], [math.inf]
    ).correct


# ── turns ──


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


# ── processes ──


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "artifacts"
    bundle = write_artifacts(folder)
    description = {"version": "1.2.3", "default_engine": "fp32", "engines": {"fp32": {}}}
    (bundle / "bundle.json").write_bytes(encode_json(description))
    rewrite(bundle)
    return folder


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


# ── the stage ──


SLOW_PEERS = ("vllm", "torch-compile", "openvino-plain")


def session(artifacts: Path, *, without: tuple[str, ...] = SLOW_PEERS) -> Session:
    runtimes = contestants(bundle_files(artifacts / "bundle"))
    return Session(
        case=CASE,
        config=TINY_BUNDLE,
        contestants=[c for c in runtimes if c.runtime not in without],
        effort=EFFORT,
        seed=0,
        on_cell=lambda _found: None,
    )


TINY_BUNDLE = tiny_config(num_layers=1, tasks=(), head_dim=0)


@pytest.fixture(scope="module")
def measured(artifacts: Path) -> Session:
    done = session(artifacts)
    done.measure("one")
    done.measure("all")
    done.measure("scaling")
    return done


def test_a_session_measures_every_runtime_on_every_cell(measured: Session) -> None:
    runtimes = (("torch-eager", "fp32"), ("torch-eager", "bf16"), ("onnx-plain", "fp32"), ("engine", "fp32"))
    points = [(1, 1.0, "one"), (1, 1.0, "all"), (3, 1.0, "all"), (3, 0.5, "all")]
    assert [(r["runtime"], r["precision"], r["batch"], r["occupancy"], r["thread_mode"]) for r in measured.rows] == [
        (*runtime, *point) for point in points for runtime in runtimes
    ]
    for row in measured.rows:
        assert row["correct"] is True
        assert row["max_abs_error"] < (1e-5 if row["precision"] == "fp32" else 0.06)
        assert row["top10_overlap"] == 1.0 or row["precision"] != "fp32"
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"] <= row["latency_ms"]["p99"]
        assert row["throughput_rps"] > 0
        assert row["peak_memory_mib"] > 0
        assert row["ratio_ci95"][0] <= row["ratio_to_eager"] <= row["ratio_ci95"][1]
        assert 0 < row["share_of_ceiling"] < 1.1
        assert row["ceiling_gflops"] > 0
        assert row["ceiling_product"]
        assert row["memory_ratio"] > 0
        assert row["ratio_to_plain_ci95"][0] <= row["ratio_to_plain"] <= row["ratio_to_plain_ci95"][1]
    eager = {r["ratio_to_eager"] for r in measured.rows if (r["runtime"], r["precision"]) == ("torch-eager", "fp32")}
    assert eager == {1.0}
    assert {row["ratio_to_plain"] for row in measured.rows if row["runtime"] == "onnx-plain"} == {1.0}


def test_two_threads_are_compared_with_one_side_by_side(measured: Session) -> None:
    if os.cpu_count() == 1:
        pytest.skip("this machine has one core")
    assert [row["runtime"] for row in measured.scaling] == ["torch-eager", "engine"]
    for row in measured.scaling:
        assert row["scaling_ci95"][0] <= row["scaling"] <= row["scaling_ci95"][1]
        assert row["scaling"] == pytest.approx(row["one_thread_ms"] / row["all_threads_ms"], rel=0.9)


def test_what_is_chosen_is_measured_and_what_is_left_out_is_said(artifacts: Path) -> None:
    runtimes = [c for c in contestants(bundle_files(artifacts / "bundle")) if c.runtime not in SLOW_PEERS]
    chosen = Session(
        case=CASE, config=TINY_BUNDLE, contestants=runtimes, effort=EFFORT, seed=0, on_cell=lambda _found: None,
        choice=Choice(entries=("retrieve",), batches=(3,), leave_out=("torch-eager bf16",)),
    )  # fmt: skip
    chosen.measure("one")
    assert chosen.rows == []
    chosen.measure("all")
    assert {(row["batch"], row["runtime"]) for row in chosen.rows} == {
        (3, "torch-eager"), (3, "onnx-plain"), (3, "engine"),
    }  # fmt: skip
    (skipped,) = chosen.skipped
    assert (skipped["runtime"], skipped["precision"]) == ("torch-eager", "bf16")
    assert "left out" in skipped["reason"]


def test_a_wrong_engine_is_found_and_never_timed(artifacts: Path, tmp_path: Path) -> None:
    broken = session(artifacts)
    wrong = dict(bundle_files(artifacts / "bundle").engines)
    folder = tmp_path / "wrong"
    folder.mkdir()
    for file in wrong["fp32"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = np.fromfile(folder / "weights.bin", dtype=np.float32)
    (weights * 1.01).tofile(folder / "weights.bin")
    broken.contestants = [
        dataclasses.replace(c, folder=folder) if c.runtime == "engine" else c for c in broken.contestants
    ]
    broken.measure("one")
    rows = {row["runtime"]: row for row in broken.rows if row["precision"] == "fp32"}
    assert not rows["engine"]["correct"]
    assert rows["engine"]["max_abs_error"] > 1e-5
    for name in ("latency_ms", "throughput_rps", "peak_memory_mib", "ratio_to_eager", "share_of_ceiling"):
        assert rows["engine"][name] is None
    assert rows["onnx-plain"]["latency_ms"] is not None


PARAMS = {
    "cases": ["trained"], "threads": ["one"], "cell_seconds": 0.01, "min_rounds": 2, "max_rounds": 3,
    "first_answer_s": 60.0, "compile_batches": [], "compile_threads": ["all"], "seed": 0,
    "entries": [], "batches": [], "occupancies": [], "leave_out": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ["huge"]}, "no case 'huge'"),
        ({"cases": []}, "at least one"),
        ({"cases": ["small", "small"]}, "none twice"),
        ({"threads": ["two"]}, "threads"),
        ({"cell_seconds": 0.0}, "cell_seconds"),
        ({"min_rounds": 5}, "min_rounds <= max_rounds"),
        ({"compile_batches": [0]}, "compile_batches"),
        ({"batches": [0]}, "batches"),
        ({"entries": ["search"]}, "entries"),
        ({"seed": -1}, "seed"),
        ({"surprise": 1}, "unknown parameter 'surprise'"),
    ],
)
def test_parameters_out_of_range_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    workspace = Workspace(artifacts=tmp_path, reports=tmp_path, values={"benchmark": PARAMS | changes})
    with pytest.raises(ParameterError, match=message):
        execute(benchmark.STAGE, workspace)


def report_of(session: Session, bundle: Artifact) -> dict[str, Any]:
    cases = {"trained": {"summary": "", "left_out": "", "model": session.config.to_dict(), "compiled": None}}
    environment = {"cpu_model": "x", "cores": 2, "calibration_ms": 1.0}
    report = {"schema": 1, "bundle": bundle.id, "environment": environment, "cases": cases}
    return report | {"results": session.rows, "scaling": session.scaling, "skipped": []}


def test_cases_measured_before_stay_while_bundle_and_machine_are_the_same(
    measured: Session, artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = report_of(measured, open_artifact(artifacts / "bundle"))
    rows = [row | {"case": "small"} for row in now["results"]]
    earlier = now | {
        "cases": {"small": {}},
        "results": rows,
        "environment": now["environment"] | {"calibration_ms": 9.0},
    }
    assert merge(now, None) == now
    merged = merge(now, earlier)
    assert set(merged["cases"]) == {"trained", "small"}
    assert len(merged["results"]) == 2 * len(rows)
    assert merge(now, merged) == merged
    for other in ({"bundle": "0" * 64}, {"environment": {"cpu_model": "y"}}, {"schema": 0}):
        assert merge(now, earlier | other) == now
    assert "dropping earlier results of small" in capsys.readouterr().err


def test_cells_measured_before_stay_beside_those_of_the_same_model(measured: Session, artifacts: Path) -> None:
    """A case may be measured piece by piece; a piece measured again takes the place of the earlier one, whole."""
    whole = report_of(measured, open_artifact(artifacts / "bundle"))
    one = whole | {"results": [r for r in whole["results"] if r["thread_mode"] == "one"], "scaling": []}
    rest = whole | {"results": [r for r in whole["results"] if r["thread_mode"] == "all"]}
    merged = merge(rest, one)
    assert merged["results"] == whole["results"]
    assert merged["scaling"] == whole["scaling"]
    fewer = whole | {"results": [r for r in whole["results"] if r["runtime"] != "engine"], "scaling": []}
    assert merge(fewer, whole)["results"] == fewer["results"]
    anew = rest | {"cases": {"trained": rest["cases"]["trained"] | {"compiled": "by other code"}}}
    assert merge(anew, one)["results"] == rest["results"]


@pytest.mark.slow
def test_the_stage_measures_peers_and_slates_and_publishes_its_report(artifacts: Path, tmp_path: Path) -> None:
    from serving.vllm_plugin.tokenizer import write_tokenizer

    bundle = artifacts / "bundle"
    write_tokenizer(bundle, TINY_BUNDLE)
    rewrite(bundle)
    gate_values = {"cases": ["trained"], "max_slowdown": 0.2, "run_noise": 0.05, "other_machine_noise": 0.15,
                   "max_quality_drop": 0.01, "max_overlap_drop": 0.05, "max_error_growth": 3.0,
                   "max_memory_growth": 0.25, "max_size_growth": 0.05, "noticed_slowdown": 0.03, "openings": 6,
                   "rounds": 20}  # fmt: skip
    params = PARAMS | {"threads": ["one", "all"], "compile_batches": [1], "first_answer_s": 240.0}
    workspace = Workspace(artifacts=artifacts, reports=tmp_path, values={"benchmark": params, "gate": gate_values})
    artifact = execute(benchmark.STAGE, workspace)
    report = json.loads((tmp_path / "benchmark.json").read_bytes())
    assert report == json.loads(artifact.file("benchmark.json").read_bytes())
    assert report["skipped"] == []
    assert {row["runtime"] for row in report["results"]} == {
        "torch-eager", "torch-compile", "onnx-plain", "openvino-plain", "engine", "vllm",
    }  # fmt: skip
    slates = [row for row in report["results"] if row["entry"] == "generate"]
    assert [(row["runtime"], row["batch"]) for row in slates] == [
        (runtime, batch) for batch in (1, 8, 32) for runtime in ("torch-eager", "vllm")
    ]
    assert all(row["correct"] and row["top10_overlap"] == 1.0 for row in slates)
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "plots" / "latency.csv").is_file()
    assert (tmp_path / "metrics" / "benchmark.json").is_file()


def test_a_report_with_wrong_results_is_published_and_fails(measured: Session, artifacts: Path, tmp_path: Path) -> None:
    report = report_of(measured, open_artifact(artifacts / "bundle"))
    report["environment"] |= benchmark_environment()
    report["results"] = [dict(row) for row in report["results"]]
    timings = ("latency_ms", "throughput_rps", "ratio_to_eager", "ratio_ci95", "peak_memory_mib", "share_of_ceiling")
    report["results"][3] |= dict.fromkeys(timings) | {"correct": False, "max_abs_error": 0.25}
    folder = tmp_path / "benchmark"
    folder.mkdir()
    (folder / "benchmark.json").write_bytes(encode_json(report))
    artifact = Artifact(path=folder, manifest={"stage": "benchmark", "files": {"benchmark.json": {}}}, id="0" * 64)
    workspace = Workspace(artifacts=artifacts, reports=tmp_path / "reports", values={})
    workspace.reports.mkdir()
    with pytest.raises(GateError, match=r"(?s)1 of 16 results are wrong.*engine fp32: max abs error 0.25") as raised:
        benchmark.publish(artifact, workspace)
    assert raised.value.exit_code == 5
    assert json.loads((workspace.reports / "benchmark.json").read_bytes())["results"][3]["correct"] is False
    assert "1 of 16 results are wrong" in (workspace.reports / "report.html").read_text()


def benchmark_environment() -> dict[str, Any]:
    from stages.measure.environment import describe_environment

    return describe_environment()


def test_the_environment_names_no_host_and_no_path() -> None:
    environment = benchmark_environment()
    text = json.dumps(environment)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["cores"] >= 1


@pytest.mark.slow
def test_a_random_model_is_compiled_as_the_bundle_was_and_only_once(tmp_path: Path) -> None:
    """With the lineage that real stages write: every stage runs on the parameters recorded there."""
    lineage = tmp_path / "bundle" / "lineage"
    lineage.mkdir(parents=True)
    from stages.parameters import read_params

    params = read_params(Path(__file__).parents[2] / "params.yaml")
    for name in ("prepare-data", "checkpoint", "export-onnx", "surgery"):
        (lineage / f"{name}.json").write_text(json.dumps({"params": params[name]}))
    (lineage / "build-engine-fp32.json").write_text(json.dumps({"params": params["build-engine"]}))
    engine = tmp_path / "bundle" / "engines" / "fp32"
    engine.mkdir(parents=True)
    spec = {"backend": "onnxruntime", "precision": "fp32", "entries": {}, "executed": True}
    (engine / "engine.json").write_text(json.dumps(spec))
    config = tiny_config(num_layers=1, num_actions=0, num_gap_buckets=0)
    case = dataclasses.replace(CASE, name="tiny", config=config, batches=(2,))
    files, refused = random_files(case, tmp_path / "bundle", tmp_path / "cases")
    assert refused == {}
    assert sorted(files.engines) == ["fp32"]
    done = Session(
        case=case, config=config, effort=EFFORT, seed=0, on_cell=lambda _found: None,
        contestants=[c for c in contestants(files) if c.runtime != "torch-compile"],
    )  # fmt: skip
    done.measure("all")
    ours = ("torch-eager", "onnx-plain", "engine")
    right = {(r["entry"], r["correct"]) for r in done.rows if r["precision"] == "fp32" and r["runtime"] in ours}
    assert right == {("retrieve", True), ("rank", True)}
    stamp = (files.onnx / "manifest.json").stat().st_mtime_ns
    shutil.rmtree(files.engines["fp32"])  # as if it had been interrupted there: the rest stands
    again, _ = random_files(case, tmp_path / "bundle", tmp_path / "cases")
    assert again == files
    assert (files.engines["fp32"] / "engine.json").is_file()
    assert (files.onnx / "manifest.json").stat().st_mtime_ns == stamp
    other = dataclasses.replace(case, config=dataclasses.replace(config, num_items=60))
    changed, _ = random_files(other, tmp_path / "bundle", tmp_path / "cases")
    assert changed.checkpoint != files.checkpoint
    assert not files.checkpoint.exists()


def test_a_case_is_compiled_anew_when_any_code_that_compiles_it_changes() -> None:
    """What dvc.yaml names as the code behind an engine is in the digest; what only measures is not."""
    root = Path(__file__).parents[2]
    sources = {path.relative_to(root).as_posix() for path in compiler_sources(root)}
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    for name in ("prepare-data", "checkpoint", "export-onnx", "surgery", "build-engine"):
        for given in stages[name]["deps"]:
            path = root / given
            files = [path] if path.is_file() else sorted(path.rglob("*.py"))
            for file in files if given.partition("/")[0] in ("stages", "hstu") else []:
                if file.read_bytes() and "tensorrt" not in file.as_posix():  # of a device that is not here
                    assert file.relative_to(root).as_posix() in sources
    assert "kernels/cpu/avx512.cpp" in sources
    measuring = {path for path in sources if path.startswith(("stages/measure", "stages/report", "stages/gate"))}
    assert measuring <= {"stages/measure/statistics.py"}  # which build-engine uses
