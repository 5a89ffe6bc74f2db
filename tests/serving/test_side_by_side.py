"""Every way to answer beside eager PyTorch."""

from __future__ import annotations

import json

from serving.requests import read_requests
from serving.side_by_side import side_by_side, text_table
from tests.serving.services import events


def test_every_way_is_held_against_eager_pytorch(bundle):
    lines = [json.dumps({"user_id": n, "events": events(bundle, 3 + n, 9, 20 + n)}) for n in range(5)]
    requests = read_requests(lines, source="test")
    rows = list(side_by_side(bundle, requests, k=5, threads=1, vllm=False))
    assert [(row.strategy, row.runtime) for row in rows] == [
        ("engine", "torch"),
        ("unified", "torch"),
        ("vllm", "torch"),
        ("engine", "fp32"),
        ("unified", "fp32"),
    ]
    for row in rows:
        assert (row.overlap, row.same_first) == (1.0, 1.0)
        assert row.max_score_error < 1e-5
        assert row.single_ms > 0 < row.batch_ms
    assert text_table(rows).count("\n") == 1 + len(rows)


def test_a_way_that_cannot_run_says_why(bundle, monkeypatch):
    from hstu.errors import MissingBackendError
    from serving import side_by_side as module

    real = module.open_retriever

    def without_engines(opened, runtime, **options):
        if runtime == "engine":
            raise MissingBackendError("the library is not here")
        return real(opened, runtime, **options)

    monkeypatch.setattr(module, "open_retriever", without_engines)
    lines = [json.dumps({"user_id": 1, "events": events(bundle, 3, 9)})]
    rows = list(side_by_side(bundle, read_requests(lines, source="test"), k=5, threads=1, vllm=False))
    assert rows[-1].not_run == "the library is not here"
    assert "the library is not here" in text_table(rows)
