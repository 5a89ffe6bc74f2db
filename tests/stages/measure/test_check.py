"""Answers are right or wrong before anything is timed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hstu.checkpoints.huggingface import save_pretrained
from hstu.model import history_from_feeds
from serving.slate import greedy_slate
from stages.measure.cases import SLATE
from stages.measure.check import check_answers
from stages.measure.runtimes import Eager
from tests.models import random_model
from tests.stages.measure.requests import answers, cell, request


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
