"""Whatever comes in, an answer is the right one or there is an error that says what is wrong: in every engine.

A valid request is damaged at random. What `check_feeds` lets through must be answered as eager PyTorch answers it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.errors import ArtifactError, CompilerError, InputError
from hstu.signature import EntryName, cache_spec, entry, entry_names
from hstu.tolerances import TOLERANCES
from kernels.cpu.library import LIBRARY, OPERATIONS
from serving.cache_rows import CacheRows
from serving.engine import Array, Engine, check_answers, check_feeds, open_engine
from serving.engines.torch import TorchEngine
from serving.user_state import Origin, StatefulEngine, extend, start
from stages.entry_check import check_batches, random_feeds, worst_error
from stages.precision.recipe import Recipe, lower_entry, write_models
from stages.returning import part
from tests.models import TINY, random_histories, random_model
from tests.serving.test_openvino_engine import write_surgered

Feeds = dict[str, Array]
ENGINES = ("onnxruntime-fp32", "openvino-fp32", "openvino-int8")
N = TINY.max_history
EXTREMES = (-(2**63), -(2**31), -1, 0, 1, TINY.num_items, TINY.num_items + 1, 2**31, 2**62, 2**63 - 1)


@pytest.fixture(scope="module")
def eager() -> TorchEngine:
    return TorchEngine(random_model(), threads=1)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, library_file: Path) -> Iterator[dict[str, Engine]]:
    root = tmp_path_factory.mktemp("engines")
    write_surgered(TINY, root / "surgered")
    opened: dict[str, Engine] = {}
    for name in ENGINES:
        backend, _, precision = name.partition("-")
        folder = root / name
        folder.mkdir()
        recipe = Recipe(
            precision=precision,
            around="bf16",
            float_keep_wide=("logits",),
            int8_keep_wide=("output", "logits"),
            method="percentile",
            percentile=99.99,
        )
        histories = random_histories(num_users=24)
        lowered = {n: lower_entry(root / "surgered", n, TINY, recipe, histories, emulated=False)[0] for n in
                   entry_names(TINY)}  # fmt: skip
        write_models(lowered, folder)
        shutil.copyfile(root / "surgered" / "config.json", folder / "config.json")
        for file in (LIBRARY, OPERATIONS):
            shutil.copyfile(library_file.with_name(file), folder / file)
        spec = {"backend": backend, "precision": precision, "executed": True}
        files = {"entries": {n: f"{n}.onnx" for n in entry_names(TINY)}}
        (folder / "engine.json").write_text(json.dumps(spec | files))
        opened[name] = open_engine(folder, threads=1)
    yield opened
    for engine in opened.values():
        engine.close()


def answer_or_error(engine: Engine, name: EntryName, feeds: Feeds) -> Any:
    """What a caller of an engine gets: an answer, or the error that it shows."""
    try:
        check_feeds(TINY, name, feeds)
        answers = engine.run(name, feeds)
        check_answers(engine, name, answers)
    except CompilerError as error:
        return error
    return answers


def assert_right(engine: Engine, name: EntryName, feeds: Feeds, expected: Any) -> None:
    got = answer_or_error(engine, name, feeds)
    assert not isinstance(got, CompilerError), got
    expected = {key: value for key, value in expected.items() if engine.precision == "fp32" or key != "cache_rows"}
    inside = np.arange(feeds["item_ids"].shape[1]) < feeds["lengths"][:, None]
    if "cache_rows" in expected:  # what stands after the end of the new events is nobody's
        expected, got = ({**a, "cache_rows": np.where(inside[:, None, :, None], a["cache_rows"], 0)} for a in
                         (expected, got))  # fmt: skip
    assert worst_error(expected, got) <= TOLERANCES[engine.precision].max_abs_error


@pytest.mark.parametrize("name", ["retrieve", "rank", "extend"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_mix_of_lengths_is_answered_as_by_eager(
    engines: dict[str, Engine], eager: TorchEngine, engine: str, name: EntryName
) -> None:
    least = 1 if name == "extend" else 0
    mixes = [[least], [N], [least, N], [N, least, 1, N - 1, 2], [least] * 3, [N] * 3, list(range(least, N + 1))]
    for seed, lengths in enumerate(mixes):
        feeds = random_feeds(TINY, name, lengths, num_candidates=5, seed=seed, run=lambda f: eager.run("extend", f))
        assert_right(engines[engine], name, feeds, eager.run(name, feeds))


@pytest.mark.parametrize("name", ["retrieve", "rank", "extend"])
def test_damaged_requests_are_refused_or_answered_rightly(
    engines: dict[str, Engine], eager: TorchEngine, name: EntryName
) -> None:
    rng = np.random.default_rng(len(name))
    valid = list(check_batches(TINY, name, seed=3, run=lambda f: eager.run("extend", f)))
    refused = answered = 0
    for _ in range(120):
        feeds = {key: value.copy() for key, value in valid[rng.integers(len(valid))].items()}
        for _ in range(rng.integers(1, 3)):
            damage(feeds, rng)
        expected = answer_or_error(eager, name, feeds)
        if isinstance(expected, CompilerError):
            assert isinstance(expected, InputError), expected
            assert expected.exit_code == 2
            refused += 1
            continue
        answered += 1
        for engine in engines.values():
            assert_right(engine, name, feeds, expected)
    assert min(refused, answered) >= 15


def damage(feeds: Feeds, rng: np.random.Generator) -> None:
    """One number, one size, one type or one input of a request is another."""
    spec = entry(TINY, "extend" if "cache" in feeds else "rank" if "candidate_ids" in feeds else "retrieve")
    key = str(rng.choice([tensor.name for tensor in spec.inputs]))
    kind = rng.random()
    if not isinstance(feeds[key], np.ndarray) or not feeds[key].size:
        return  # damaged enough
    if kind < 0.85:
        index = tuple(int(rng.integers(size)) for size in feeds[key].shape)
        of_cache = (np.nan, np.inf, -np.inf, 0.0, -1.0)
        feeds[key][index] = rng.choice(of_cache) if key == "cache" else EXTREMES[rng.integers(len(EXTREMES))]
    elif kind < 0.9:
        feeds[key] = feeds[key].astype(np.int32 if key != "cache" else np.float16)
    elif kind < 0.95:
        axis = int(rng.integers(feeds[key].ndim))
        feeds[key] = np.take(feeds[key], range(int(rng.integers(feeds[key].shape[axis]))), axis=axis)
    else:
        feeds[key] = feeds[key].tolist()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("retrieve", {"item_ids": np.full((2, 4), 2**40)}, "item_ids out of range"),
        ("retrieve", {"timestamps": np.array([[2**63 - 1, -(2**63), 3, 4]] * 2)}, "timestamps out of range"),
        ("retrieve", {"timestamps": np.array([[5, 4, 3, 2]] * 2)}, "timestamps fall"),
        ("retrieve", {"query_time": np.array([-1, 0])}, "query_time out of range"),
        ("retrieve", {"lengths": np.array([5, 0])}, "lengths out of range"),
        ("retrieve", {"item_ids": [[1, 2, 3, 4]] * 2}, "is no array"),
        ("retrieve", {"item_ids": np.zeros((0, 4), np.int64)}, "wrong shape|no users"),
        ("rank", {"candidate_ids": np.zeros((2, 0), np.int64)}, "no candidates"),
        ("rank", {"candidate_ids": np.zeros((2, 3), np.int64)}, "candidate_ids out of range"),
    ],
)
def test_what_is_wrong_is_said(name: EntryName, change: Feeds, message: str) -> None:
    feeds = random_feeds(TINY, name, [4, 4], num_candidates=3)
    with pytest.raises(InputError, match=message):
        check_feeds(TINY, name, {**feeds, **change})


def test_nobody_is_no_batch() -> None:
    feeds = {key: value[:0] for key, value in random_feeds(TINY, "retrieve", [4, 4]).items()}
    with pytest.raises(InputError, match="no users"):
        check_feeds(TINY, "retrieve", feeds)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_stands_after_an_end_changes_nothing(engines: dict[str, Engine], eager: TorchEngine, engine: str) -> None:
    """Ids, actions and times after the end of a history, and NaN after the end of a cache."""
    for name in entry_names(TINY):
        feeds = dict(list(check_batches(TINY, name, seed=8, run=lambda f: eager.run("extend", f)))[1])
        expected = engines[engine].run(name, feeds)
        after = np.arange(feeds["item_ids"].shape[1]) >= feeds["lengths"][:, None]
        for key, value in (("item_ids", TINY.num_items), ("actions", 3), ("timestamps", 2**62)):
            feeds[key] = np.where(after, value, feeds[key])
        if name == "extend":
            end = np.arange(feeds["cached_timestamps"].shape[1]) >= feeds["cached_lengths"][:, None]
            feeds["cached_timestamps"] = np.where(end, -(2**62), feeds["cached_timestamps"])
            feeds["cache"] = np.where(end[:, None, :, None], np.float32(np.nan), feeds["cache"])
        check_feeds(TINY, name, feeds)
        answers = engines[engine].run(name, feeds)
        for output in expected:
            if output != "cache_rows":
                np.testing.assert_array_equal(answers[output], expected[output], err_msg=f"{name} {output}")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_of_numbers_that_overflow_is_an_error(engines: dict[str, Engine], engine: str) -> None:
    """Every number of it is finite, so it passes the checks; what it leads to does not pass for an answer."""
    stateful = StatefulEngine(engine=engines[engine], origin=Origin(checkpoint="c", engine="e", precision="p"))
    histories = random_histories(lengths=[9, 5], seed=1)
    states, _ = start(stateful, histories)
    rows = np.full(cache_spec(TINY).shape(8), 3e38, np.float32)
    states[0] = replace(states[0], rows=CacheRows(cache_spec(TINY), "fp32").append(rows))
    with pytest.raises(ArtifactError, match=r"(?s)not a number.*rows \[0\]"):
        extend(stateful, states, part(histories, histories.lengths, histories.lengths))
