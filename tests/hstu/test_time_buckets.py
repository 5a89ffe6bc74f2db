"""Time buckets: the integer edges are those of Meta's formula, everywhere."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu.config import NUM_TIME_BUCKETS
from hstu.time_buckets import THRESHOLDS, time_buckets


def metas_formula(dt: torch.Tensor) -> torch.Tensor:
    """⌊ln(max(1, |dt|)) / 0.301⌋ clamped to 0..128, as generative-recommenders writes it."""
    return torch.clamp((torch.log(torch.abs(dt).clamp(min=1)) / 0.301).long(), 0, NUM_TIME_BUCKETS)


def by_edges(dt: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(dt.abs(), torch.tensor(THRESHOLDS), right=True)


def test_every_edge_and_its_neighbours() -> None:
    edges = torch.tensor(THRESHOLDS)
    for shift in (-2, -1, 0, 1, 2):
        dt = (edges + shift).clamp(min=0)
        assert torch.equal(time_buckets(dt), metas_formula(dt)), shift
        assert torch.equal(time_buckets(dt), by_edges(dt)), shift


def test_small_differences_one_by_one() -> None:
    dt = torch.arange(200_000)
    assert torch.equal(time_buckets(dt), metas_formula(dt))
    assert torch.equal(time_buckets(-dt), metas_formula(dt))


def test_random_differences_of_every_size() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in range(1, 61):
        dt = torch.randint(0, 2**bits, (20_000,), generator=generator)
        assert torch.equal(time_buckets(dt), metas_formula(dt)), bits
        assert torch.equal(time_buckets(dt), by_edges(dt)), bits


@given(st.integers(min_value=-(2**62), max_value=2**62))
def test_any_difference(dt: int) -> None:
    value = torch.tensor([dt])
    assert torch.equal(time_buckets(value), by_edges(value))


def test_the_ends() -> None:
    assert time_buckets(torch.tensor([0, 1, 2])).tolist() == [0, 0, 2]
    assert time_buckets(torch.tensor([THRESHOLDS[-1] - 1, THRESHOLDS[-1], 2**62])).tolist() == [127, 128, 128]
    assert len(THRESHOLDS) == NUM_TIME_BUCKETS
    assert list(THRESHOLDS) == sorted(THRESHOLDS)
    assert time_buckets(torch.zeros(2, 0, 3, dtype=torch.long)).shape == (2, 0, 3)
