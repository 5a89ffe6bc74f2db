"""The fused projection in Triton: SiLU(x Wᵀ + b), in fp16, bf16 and int8."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.silu import silu_of_half


@triton.jit
def uvqk_silu(
    x, weight, bias, x_scale, weight_scale, out, num_rows, num_columns, depth, x_row, weight_row, out_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, INT8: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """out [M, N] = SiLU(x · weightᵀ + bias): x [M, K], weight [N, K], bias float32 [N].

    With INT8 x and weight are int8, x_scale float32 [M] and weight_scale float32 [N] multiply the int32 sums: exact up
    to the scales. GROUP row blocks share a column block while it is in the cache. K is a multiple of BLOCK_K.
    """
    program, rows, columns = tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    group = program // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    row_block = group * GROUP + (program % (GROUP * columns)) % height
    column_block = (program % (GROUP * columns)) // height
    i = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    j = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_pointers = x + (i % num_rows).to(tl.int64)[:, None] * x_row + inner[None, :]
    w_pointers = weight + (j % num_columns).to(tl.int64)[:, None] * weight_row + inner[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INT8 else tl.float32)
    for _ in tl.range(0, depth, BLOCK_K):
        rows_here, columns_here = tl.load(x_pointers), tl.trans(tl.load(w_pointers))
        acc = tl.dot(rows_here, columns_here, acc, input_precision="ieee", out_dtype=acc.dtype)
        x_pointers += BLOCK_K
        w_pointers += BLOCK_K
    total = acc.to(tl.float32)
    if INT8:
        total *= tl.load(x_scale + i % num_rows)[:, None] * tl.load(weight_scale + j % num_columns)[None, :]
    total += tl.load(bias + j % num_columns)[None, :]
    pointers = out + i.to(tl.int64)[:, None] * out_row + j[None, :]
    inside = (i < num_rows)[:, None] & (j < num_columns)[None, :]
    tl.store(pointers, silu_of_half(0.5 * total, FAST).to(out.dtype.element_ty), mask=inside)
