"""The registry of cases, and the requests that are drawn for their cells."""

from __future__ import annotations

import numpy as np
import pytest

from hstu.errors import ParameterError
from stages.measure.cases import CASES, cells, find_case
from stages.measure.requests import draw_lengths
from tests.models import TINY
from tests.stages.measure.requests import request


def test_an_unknown_case_names_the_known_ones() -> None:
    with pytest.raises(ParameterError, match="trained, small, deep-512, reference-512, reference-2048, ml-20m-large"):
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
