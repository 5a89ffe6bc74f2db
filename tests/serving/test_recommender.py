"""Slates through the recommender: who makes them, what an answer holds, who is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hstu.checkpoints.huggingface import save_pretrained
from hstu.data.vocabulary import Vocabulary
from hstu.errors import InputError, UsageError
from serving.bundle import Bundle
from serving.engines.torch import open_torch_engine
from serving.recommender import EngineRetriever, Recommender, TorchRetriever
from serving.requests import Request
from serving.slate import Slate
from tests.models import TINY, random_model


@pytest.fixture
def recommender(tmp_path: Path) -> Recommender:
    save_pretrained(random_model(), tmp_path)
    vocabulary = Vocabulary(items=tuple(str(100 + item) for item in range(1, 151)), actions=("view", "buy", "like"))
    artifact: Any = SimpleNamespace(path=tmp_path)
    bundle = Bundle(artifact=artifact, config=TINY, vocabulary=vocabulary, description={})
    return Recommender(bundle, TorchRetriever(open_torch_engine(tmp_path, threads=1), "torch"))


def _requests(lengths: list[int]) -> list[Request]:
    return [
        Request(user_id=f"u{n}", item_ids=[101 + i for i in range(n)], timestamps=list(range(n)), actions=[None] * n)
        for n in lengths
    ]


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_a_slate_of_each_kind(recommender: Recommender, method: Any) -> None:
    slate = Slate(num_items=4, method=method, width=8, exclude_history=True)
    requests = _requests([12, 3, 20])
    answers = list(recommender.recommend(requests, num_items=4, slate=slate))
    assert [answer["user_id"] for answer in answers] == ["u12", "u3", "u20"]
    for answer, request in zip(answers, requests, strict=True):
        items = [item["item_id"] for item in answer["items"]]
        assert len(set(items)) == 4
        assert not set(items) & set(request.item_ids)
        assert answer["slate"] == method
    assert answers == list(recommender.recommend(requests, num_items=4, slate=slate))


def test_who_makes_no_slates_says_so(recommender: Recommender) -> None:
    engine: Any = recommender.retriever
    recommender.retriever = EngineRetriever(engine.engine, "engine")
    with pytest.raises(UsageError, match="make no slates"):
        list(recommender.recommend(_requests([3]), num_items=2, slate=Slate(num_items=2)))


def test_a_slate_that_cannot_be_made(recommender: Recommender) -> None:
    with pytest.raises(InputError, match="too wide"):
        list(recommender.recommend(_requests([3]), num_items=2, slate=Slate(num_items=2, method="beam", width=999)))
