"""Everything a model knows of time, as small integers computed before the graph runs.

Times are int64 in the log's own unit, up to milliseconds since 1970; an engine that computes in int32 would cut
them, and an engine that does not would make a [B, L, L] tensor of int64 of them. What the model needs is only in
which of 129 buckets each difference falls (`hstu.time_buckets`), which is a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hstu.config import HSTUConfig
from serving.engine import Array

HISTORY_BUCKETS = "history_buckets"  # uint8 [B, L, L]: t_{i+1} - t_j for j <= i
QUERY_BUCKETS = "query_buckets"  # uint8 [B, 1, L]: query time - t_j
GAP_ROWS = "gap_rows"  # int32 [B, L]: row of the gap table for t_i - t_{i-1}
CANDIDATE_GAP_ROWS = "candidate_gap_rows"  # int32 [B, C]: row of the gap table for query time - last event
EXTEND_BUCKETS = "extend_buckets"  # uint8 [B, E, P+E]: t_{i+1} of new events - t_j of cached, then of new ones
EXTEND_QUERY_BUCKETS = "extend_query_buckets"  # uint8 [B, 1, P+E]: query time - t_j of the same
NAMES = (HISTORY_BUCKETS, QUERY_BUCKETS, GAP_ROWS, CANDIDATE_GAP_ROWS, EXTEND_BUCKETS, EXTEND_QUERY_BUCKETS)

Buckets = Callable[[Array, Array, bool], Array]  # start [B, Q], end [B, T], causal → uint8 [B, Q, T]


def time_features(
    config: HSTUConfig, feeds: Mapping[str, Array], wanted: frozenset[str], buckets: Buckets
) -> dict[str, Array]:
    """The wanted features of the feeds of an entry (`hstu.signature`), as `hstu.model` defines them."""
    times, lengths, query = feeds["timestamps"], feeds["lengths"], feeds["query_time"]
    features: dict[str, Array] = {}
    if wanted & {HISTORY_BUCKETS, EXTEND_BUCKETS}:
        following = np.zeros_like(times)
        following[:, :-1] = times[:, 1:]
        rows = np.flatnonzero(lengths)
        following[rows, lengths[rows] - 1] = query[rows]
        if HISTORY_BUCKETS in wanted:
            features[HISTORY_BUCKETS] = buckets(following, np.ascontiguousarray(times), True)
    if wanted & {EXTEND_BUCKETS, EXTEND_QUERY_BUCKETS}:
        every = np.concatenate([_cached_times(feeds), times], axis=1)
        if EXTEND_BUCKETS in wanted:
            features[EXTEND_BUCKETS] = buckets(following, every, False)
        if EXTEND_QUERY_BUCKETS in wanted:
            features[EXTEND_QUERY_BUCKETS] = buckets(query[:, None].copy(), every, False)
    if QUERY_BUCKETS in wanted:
        features[QUERY_BUCKETS] = buckets(query[:, None].copy(), np.ascontiguousarray(times), False)
    if GAP_ROWS in wanted and HISTORY_BUCKETS in features:
        rows = np.zeros(times.shape, dtype=np.int32)  # t_i - t_{i-1} has a bucket already, at the last row's i-1
        between = np.diagonal(features[HISTORY_BUCKETS], axis1=1, axis2=2)
        np.minimum(between[:, :-1], config.num_gap_buckets - 1, out=rows[:, 1:], casting="unsafe")
        features[GAP_ROWS] = rows
    elif GAP_ROWS in wanted:
        gaps = np.zeros_like(times)
        gaps[:, 1:] = times[:, 1:] - times[:, :-1]
        if "cached_lengths" in feeds:
            rows = np.flatnonzero(feeds["cached_lengths"])
            gaps[rows, 0] = times[rows, 0] - feeds["cached_timestamps"][rows, feeds["cached_lengths"][rows] - 1]
        features[GAP_ROWS] = _gap_rows(config, gaps, buckets)
    if CANDIDATE_GAP_ROWS in wanted:
        last = np.take_along_axis(times, np.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
        rows = _gap_rows(config, np.where(lengths > 0, query - last, 0)[:, None], buckets)
        features[CANDIDATE_GAP_ROWS] = np.repeat(rows, feeds["candidate_ids"].shape[1], axis=1)
    return features


def _cached_times(feeds: Mapping[str, Array]) -> Array:
    """Times of cached events int64 [B, P], 0 after the end of each cache."""
    times = feeds["cached_timestamps"]
    return np.where(np.arange(times.shape[1]) < feeds["cached_lengths"][:, None], times, 0)


def _gap_rows(config: HSTUConfig, gaps: Array, buckets: Buckets) -> Array:
    """int32 of the same shape [B, L]: the bucket of each gap, at most the last row of the table."""
    found = buckets(gaps.reshape(-1, 1), np.zeros((gaps.size, 1), dtype=np.int64), False)
    return np.minimum(found.reshape(gaps.shape), config.num_gap_buckets - 1).astype(np.int32)
