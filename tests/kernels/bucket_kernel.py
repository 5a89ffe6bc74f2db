"""A kernel that does nothing but sort time differences into buckets, for the tests."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.hstu_attention.triton import staged_table, time_bucket


@triton.jit
def buckets(dt, edges, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    """out int32 = the bucket of dt int64, both [ROWS, COLUMNS]."""
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + place, time_bucket(tl.load(dt + place), staged_table(edges, 1.0), ROWS, COLUMNS))
