"""From seconds to the figures of the report: percentiles, throughput, ratios with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
Floats = npt.NDArray[np.float64]


def latency_ms(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of the requests, in milliseconds."""
    values = np.percentile(np.asarray(seconds) * 1e3, [50, 95, 99])
    return {name: significant(value) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}


def median_with_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The median and its 95 % confidence interval (percentile bootstrap over rounds)."""
    sample = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(0, len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.percentile(np.median(sample[rows], axis=1), [2.5, 97.5])
    return significant(np.median(sample)), (significant(low), significant(high))


def significant(value: float | np.floating, digits: int = 4) -> float:
    """`value` rounded to that many significant digits: what the measurement can carry."""
    return float(f"{float(value):.{digits}g}")
