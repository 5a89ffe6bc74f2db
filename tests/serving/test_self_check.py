"""The self-check refuses engines that drift from call to call and answers that depend on the batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from hstu.errors import GateError
from hstu.signature import EntryName
from serving.engine import Array
from serving.engines.torch import TorchEngine
from serving.self_check import check_independent, check_repeatable
from stages.entry_check import random_feeds
from tests.models import TINY, random_model


class Drifting(TorchEngine):
    """Right for the first calls, then off by a bit more at each."""

    def __init__(self, *, good_calls: int) -> None:
        super().__init__(random_model())
        self.calls, self.good_calls = 0, good_calls

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.calls += 1
        drift = max(0, self.calls - self.good_calls) * np.float32(1e-6)
        return {
            name: value + drift if value.dtype == np.float32 else value
            for name, value in super().run(entry, feeds).items()
        }


class ScaledByBatch(TorchEngine):
    """Rounds to steps of the largest value in the batch, as dynamic quantisation per tensor does."""

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        answers = super().run(entry, feeds)
        for name, value in answers.items():
            if value.dtype == np.float32:
                step = np.abs(value).max() / 127
                answers[name] = np.rint(value / step).astype(np.float32) * step
        return answers


class SeesPadding(TorchEngine):
    """Takes every row for as long as the longest."""

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        longest = np.full_like(feeds["lengths"], feeds["item_ids"].shape[1])
        return super().run(entry, {**feeds, "lengths": longest})


@pytest.mark.parametrize("name", ["retrieve", "rank"])
def test_the_eager_model_passes(name: EntryName) -> None:
    engine, feeds = TorchEngine(random_model()), random_feeds(TINY, name, [20, 3, 0, 9], num_candidates=5)
    check_repeatable(engine, name, feeds)
    assert check_independent(engine, name, feeds, limit=1e-5) <= 1e-5


@pytest.mark.parametrize(("good_calls", "call"), [(1, 3), (2, 3), (3, 10), (9, 10)])
def test_drift_is_found(good_calls: int, call: int) -> None:
    feeds = random_feeds(TINY, "retrieve", [4, 2])
    with pytest.raises(GateError, match=f"call {call} is not that of call 1"):
        check_repeatable(Drifting(good_calls=good_calls), "retrieve", feeds)


@pytest.mark.parametrize("engine", [ScaledByBatch, SeesPadding])
def test_answers_that_depend_on_the_batch_are_found(engine: type[TorchEngine]) -> None:
    feeds = random_feeds(TINY, "rank", [20, 3, 9], num_candidates=5)
    with pytest.raises(GateError, match="depends on who shares the batch"):
        check_independent(engine(random_model()), "rank", feeds, limit=1e-5)
