"""Histograms and the scales taken from them."""

from __future__ import annotations

import numpy as np
import pytest

from hstu.errors import InputError
from stages.precision.calibration import LEVELS, Histogram, fit


def histogram(*parts: np.ndarray) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part.astype(np.float32))
    return made


def test_nothing_is_lost_when_the_range_grows() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=1000) * scale for scale in (0.0, 1e-3, 1.0, 700.0)]
    made = histogram(*parts)
    assert made.counts.sum() == 4000
    assert made.largest == pytest.approx(np.abs(parts[3]).max())
    everything = np.abs(np.concatenate(parts))
    assert made.limit("percentile", percentile=90.0) == pytest.approx(np.quantile(everything, 0.9), rel=0.02)


def test_max_percentile_and_mse_on_a_heavy_tail() -> None:
    values = np.random.default_rng(1).standard_t(2, size=200_000)
    made = histogram(values)
    assert made.limit("max", percentile=0.0) == pytest.approx(np.abs(values).max())
    exact = float(np.quantile(np.abs(values), 0.999))
    assert made.limit("percentile", percentile=99.9) == pytest.approx(exact, rel=0.1)
    errors = {method: made.squared_error(made.limit(method, percentile=99.9) / LEVELS) for method in ("max", "mse")}
    assert errors["mse"] < errors["max"]


def test_the_predicted_error_is_the_true_one() -> None:
    values = np.random.default_rng(2).normal(size=100_000).astype(np.float32)
    made = histogram(values)
    for limit in (1.5, 3.0, 5.0):
        scale = limit / LEVELS
        rounded = np.clip(np.rint(values / scale), -LEVELS, LEVELS) * scale
        assert made.squared_error(scale) == pytest.approx(float(((rounded - values) ** 2).sum()), rel=0.05)
        assert made.clipped(scale) == pytest.approx(float((np.abs(values) > limit).mean()), abs=1e-3)


def test_a_scale_is_judged_by_histories_it_was_not_fitted_on() -> None:
    rng = np.random.default_rng(3)
    scale = fit(histogram(rng.normal(size=5000)), histogram(3.0 * rng.normal(size=5000)), "max", percentile=100.0)
    assert scale.held_out_clipped > 0.1
    assert scale.held_out_error > 0.1
    same = fit(histogram(rng.normal(size=5000)), histogram(rng.normal(size=5000)), "max", percentile=100.0)
    assert same.held_out_clipped < 1e-3
    assert same.held_out_error < 0.02


def test_a_tensor_that_is_always_zero_has_a_scale() -> None:
    assert fit(histogram(np.zeros(8)), histogram(np.zeros(8)), "percentile", percentile=99.0).scale > 0


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        histogram(np.array([1.0, np.inf]))
