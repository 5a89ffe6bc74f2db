"""Which engine stands in for which: in a documented order, counted, logged once and told to the caller."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from hstu.artifact import open_artifact
from hstu.errors import ArtifactError
from serving.bundle import Bundle, open_bundle
from serving.engine_order import FALLBACKS, engine_order, open_default
from serving.recommender import Recommender, open_retriever
from serving.requests import read_requests
from tests.stages.bundles import rewrite, write_artifacts


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose default engine is one of TensorRT-RTX, which no GPU here can run."""
    folder = write_artifacts(tmp_path_factory.mktemp("artifacts"))
    description = {"version": "0.1.0", "default_engine": "fp32-tensorrt-rtx", "entries": ["extend", "retrieve"]}
    description["engines"] = {"fp32-tensorrt-rtx": {}, "fp32": {}}  # type: ignore[assignment]
    (folder / "bundle.json").write_text(json.dumps(description))
    rewrite(folder)
    open_artifact(folder)
    return open_bundle(folder)


def test_the_order_is_tensorrt_onnx_runtime_pytorch(bundle: Bundle) -> None:
    assert engine_order(bundle) == ("fp32-tensorrt-rtx", "fp32", "torch")


def test_a_fallback_is_counted_logged_and_in_the_answer(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    FALLBACKS.clear()
    with caplog.at_level(logging.WARNING, logger="serving.engine_order"):
        retriever = open_retriever(bundle, "engine", threads=1)
    assert FALLBACKS == {("fp32-tensorrt-rtx", "fp32"): 1}
    assert len(caplog.records) == 1
    line = json.dumps({"user_id": "u", "events": [{"item_id": 3, "timestamp": 10}, {"item_id": 5, "timestamp": 20}]})
    requests = list(read_requests([line], source="test"))
    answer = next(iter(Recommender(bundle, retriever).recommend(requests, num_items=3)))
    assert answer["runtime"] == "engine"
    assert (answer["fallback"]["wanted"], answer["fallback"]["used"]) == ("fp32-tensorrt-rtx", "fp32")
    assert "fp32-tensorrt-rtx" in answer["fallback"]["reason"]


def test_an_engine_that_was_asked_for_has_no_stand_in(bundle: Bundle) -> None:
    with pytest.raises(ArtifactError, match="does not say what it was built with"):
        open_retriever(bundle, "engine", engine="fp32-tensorrt-rtx", threads=1)


def test_pytorch_is_the_last(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    FALLBACKS.clear()
    monkeypatch.setattr("serving.engine_order.engine_order", lambda _: ("fp32-tensorrt-rtx", "torch"))
    engine, fallback = open_default(bundle)
    assert (engine.backend, fallback and fallback.used) == ("torch", "torch")
    engine.close()


def test_nothing_is_said_when_the_default_engine_runs(tmp_path: Path) -> None:
    folder = write_artifacts(tmp_path)
    description = {"version": "0.1.0", "default_engine": "fp32", "engines": {"fp32": {}}, "entries": ["retrieve"]}
    (folder / "bundle.json").write_text(json.dumps(description))
    rewrite(folder)
    FALLBACKS.clear()
    engine, fallback = open_default(open_bundle(folder), threads=1)
    assert (engine.backend, fallback, dict(FALLBACKS)) == ("onnxruntime", None, {})
    engine.close()
