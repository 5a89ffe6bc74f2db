"""Engines behind the common interface: right answers on odd lengths, and one clear error for each broken folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hstu.config import HSTUConfig
from hstu.data.histories import histories_from_rows
from hstu.errors import ArtifactError, CompilerError, InputError, MissingBackendError
from hstu.model import HSTU, history_from_feeds
from hstu.signature import entry_names
from serving.engine import check_feeds, open_engine
from serving.engines.tensorrt_facts import BuildFacts
from serving.engines.torch import TorchEngine, open_torch_engine
from stages.entry_check import check_batches, random_feeds, worst_error
from stages.exporter import export_entry
from stages.onnx_files import open_weights, write_model
from tests.models import random_model, tiny_config, write_checkpoint

CONFIG = tiny_config(num_layers=1)


@pytest.fixture(scope="module")
def model() -> HSTU:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def folder(model: HSTU, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX Runtime engine of the plain export."""
    path = tmp_path_factory.mktemp("engine")
    with open_weights(path) as writer:
        for name in entry_names(CONFIG):
            write_model(export_entry(model, name, opset=20, writer=writer), path, name, writer)
    (path / "config.json").write_text(json.dumps(CONFIG.to_pretrained()))
    spec = {"backend": "onnxruntime", "precision": "fp32", "executed": True}
    entries = {name: f"{name}.onnx" for name in entry_names(CONFIG)}
    (path / "engine.json").write_text(json.dumps({**spec, "entries": entries}))
    return path


def copied(folder: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(folder, target)
    change(target)
    return target


@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_answers_as_eager_on_every_corner(folder: Path, model: HSTU, threads: int) -> None:
    engine, eager = open_engine(folder, threads=threads), TorchEngine(model)
    assert (engine.backend, engine.precision, engine.config) == ("onnxruntime", "fp32", CONFIG)
    for name in entry_names(CONFIG):
        for feeds in check_batches(CONFIG, name, seed=5):
            check_feeds(CONFIG, name, feeds)
            assert worst_error(eager.run(name, feeds), engine.run(name, feeds)) <= 1e-5
    engine.close()
    with pytest.raises(InputError, match="no 'retrieve' entry"):
        engine.run("retrieve", {})


def test_outputs_are_those_of_the_signature(folder: Path) -> None:
    engine = open_engine(folder, threads=1)
    answers = engine.run("retrieve", random_feeds(CONFIG, "retrieve", [3, 0]))
    assert {name: (value.dtype, value.shape) for name, value in answers.items()} == {
        "user_embedding": (np.float32, (2, CONFIG.embedding_dim)),
        "top_item_ids": (np.int64, (2, 100)),
        "top_scores": (np.float32, (2, 100)),
    }
    scores = engine.run("rank", random_feeds(CONFIG, "rank", [3, 0], num_candidates=4))["task_scores"]
    assert (scores.dtype, scores.shape) == (np.float32, (2, 4, 3))


def test_a_history_of_no_events_is_answered(folder: Path, model: HSTU) -> None:
    feeds = histories_from_rows([{"item_ids": [], "timestamps": []}]).feeds(CONFIG)
    answers = open_engine(folder, threads=1).run("retrieve", feeds)
    assert worst_error(TorchEngine(model).run("retrieve", feeds), answers) <= 1e-5
    assert np.isfinite(answers["top_scores"]).all()


def test_torch_engine_is_the_model(tmp_path: Path, model: HSTU) -> None:
    write_checkpoint(tmp_path / "checkpoint", model, num_users=2)
    engine = open_torch_engine(tmp_path / "checkpoint", threads=torch.get_num_threads())
    feeds = random_feeds(CONFIG, "rank", [20, 7, 0], num_candidates=3)
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    expected = model.rank(history_from_feeds(tensors), tensors["candidate_ids"])
    np.testing.assert_array_equal(engine.run("rank", feeds)["task_scores"], expected.numpy())
    embedding, items, scores = model.retrieve(history_from_feeds(tensors))
    answers = engine.run("retrieve", {name: value for name, value in feeds.items() if name != "candidate_ids"})
    for name, value in (("user_embedding", embedding), ("top_item_ids", items), ("top_scores", scores)):
        np.testing.assert_array_equal(answers[name], value.numpy())


def test_a_model_without_heads_has_no_rank_entry() -> None:
    config = HSTUConfig(
        num_items=9, embedding_dim=8, num_layers=1, num_heads=1, qk_dim=4, v_dim=4, max_history=5
    )  # fmt: skip
    with pytest.raises(InputError, match="no 'rank' entry"):
        TorchEngine(random_model(config)).run("rank", {})


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:size])  # type: ignore[return-value]


def spec(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        values = json.loads((path / "engine.json").read_text())
        (path / "engine.json").write_text(json.dumps({**values, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda path: (path / "engine.json").unlink(), ArtifactError, "not an engine"),
        (cut("engine.json", 20), ArtifactError, "not an engine"),
        (lambda path: (path / "config.json").unlink(), InputError, r"config\.json"),
        (lambda path: (path / "rank.onnx").unlink(), ArtifactError, r"rank\.onnx"),
        (cut("retrieve.onnx", 3000), ArtifactError, r"retrieve\.onnx"),
        (cut("weights.bin", 64), ArtifactError, "cannot load it"),
        (lambda path: (path / "weights.bin").unlink(), ArtifactError, "cannot load it"),
        (spec(backend="abacus"), ArtifactError, "no runtime for backend 'abacus'"),
        (spec(entries={"retrieve": "retrieve.onnx"}), ArtifactError, "lacks entries"),
        (spec(extra=1), ArtifactError, "not an engine"),
    ],
    ids=[
        "no spec",
        "cut spec",
        "no config",
        "no graph",
        "cut graph",
        "cut weights",
        "no weights",
        "backend",
        "entry",
        "key",
    ],
)
def test_a_broken_folder_is_one_clear_error(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], error: type[CompilerError], match: str
) -> None:
    with pytest.raises(error, match=match):
        open_engine(copied(folder, tmp_path / "broken", change), threads=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_gpu_engine_says_what_is_missing(folder: Path, tmp_path: Path, backend: str) -> None:
    broken = copied(folder, tmp_path / "engine", spec(backend=backend))
    product, module = {"tensorrt": ("TensorRT", "tensorrt"), "tensorrt-rtx": ("TensorRT-RTX", "tensorrt_rtx")}[backend]
    built = BuildFacts(
        product=product, module=module, version="1.0", executed=False, device=None, settings={}, entries={}
    )
    built.write(broken)
    with pytest.raises(MissingBackendError, match=r"not installed|do not run here"):
        open_engine(broken)
