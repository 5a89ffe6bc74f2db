"""Time buckets are exact: integer thresholds decide, whatever the logarithm does."""

from __future__ import annotations

import pytest
import torch

from hstu.time_buckets import THRESHOLDS, time_buckets


def expected(dt: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(torch.tensor(THRESHOLDS), dt.abs(), right=True)


@pytest.mark.parametrize(
    "dt",
    [
        pytest.param(torch.arange(-10, 300_000), id="small"),
        pytest.param((torch.tensor(THRESHOLDS).unsqueeze(1) + torch.arange(-300, 300)).flatten().abs(), id="edges"),
        pytest.param(torch.tensor([2**63 - 1, 2**62, -(2**62), 2**53 + 1]), id="largest"),
    ],
)
def test_buckets_are_where_the_thresholds_say(dt: torch.Tensor) -> None:
    assert torch.equal(time_buckets(dt), expected(dt))


def test_an_inexact_logarithm_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dt = (torch.tensor(THRESHOLDS).unsqueeze(1) + torch.arange(-3, 4)).flatten().clamp(min=0)
    exact = torch.log
    for error in (-1e-5, 1e-5):  # a hundred units in the last place
        monkeypatch.setattr(torch, "log", lambda x, error=error: exact(x) + error)
        assert torch.equal(time_buckets(dt), expected(dt))


def test_bucket_is_metas_formula() -> None:
    dt = torch.cat([torch.arange(0, 100_000), torch.arange(0, 10**15, 7 * 10**10 + 1)])
    formula = (torch.log(dt.float().clamp(min=1.0)) / 0.301).long().clamp(0, 128)
    assert (time_buckets(dt) != formula).float().mean() < 1e-4  # they may differ where the formula is at an edge
