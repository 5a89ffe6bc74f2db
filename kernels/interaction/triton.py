"""Pairwise dot products of features in Triton, packed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def interaction(
    x, out, num_samples, x_row, out_row,
    F: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr, SELF: tl.constexpr, SAMPLES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [B, PAIRS] = x_i · x_j of the lower triangle, row by row: (1,0), (2,0), (2,1), ..; with SELF (0,0), (1,0), ..

    x [B, F, D] contiguous but for its rows, `x_row` elements apart. Bound by memory: one program goes through SAMPLES
    samples, loading the next while it multiplies; the packed triangle is gathered on chip, so that stores are whole.
    """
    f, d, p = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    # row of pair p: the largest r with r(r+1)/2 <= p; exact in float32 for every p < 2²⁰
    row = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = p - row * (row + 1) // 2
    if not SELF:
        row += 1
    entry = tl.minimum(row * BLOCK_F + column, BLOCK_F * BLOCK_F - 1)
    begin = tl.program_id(0).to(tl.int64) * SAMPLES
    inside = (f < F)[:, None] & (d < D)[None, :]
    for sample in tl.range(begin, tl.minimum(begin + SAMPLES, num_samples), num_stages=STAGES):
        features = tl.load(x + sample * x_row + f[:, None] * D + d[None, :], mask=inside, other=0.0)
        products = tl.dot(features, tl.trans(features), input_precision="ieee")
        packed = tl.gather(products.reshape(BLOCK_F * BLOCK_F), entry, 0)
        tl.store(out + sample * out_row + p, packed.to(out.dtype.element_ty), mask=p < PAIRS)
