"""Gather and sum of embedding rows in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embedding_bag(
    table, ids, offsets, out, num_bags, table_row, out_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BAGS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [B, D] = the sum of table rows ids[offsets[b] : offsets[b+1]], int64, in float32 and in order."""
    d = tl.arange(0, BLOCK_D)
    begin = tl.program_id(0).to(tl.int64) * BAGS
    for bag in range(begin, tl.minimum(begin + BAGS, num_bags)):
        acc = tl.zeros([BLOCK_D], tl.float32)
        for place in tl.range(tl.load(offsets + bag), tl.load(offsets + bag + 1), num_stages=STAGES):
            row = tl.load(ids + place)
            acc += tl.load(table + row * table_row + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(out + bag * out_row + d, acc.to(out.dtype.element_ty), mask=d < D)
