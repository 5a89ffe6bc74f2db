"""SiLU inside Triton kernels, in the form that costs one special-function operation."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu_of_half(half, FAST: tl.constexpr):
    """SiLU(2·half) as half·tanh(half) + half, float32 of any shape.

    x·sigmoid(x) = x/2·(1 + tanh(x/2)); source: sigmoid(x) = (1 + tanh(x/2))/2. With FAST the hardware's
    tanh.approx.f32 (relative error 2⁻¹¹, below what fp16 and bf16 keep); without it, for float32, an exponential
    and a division.
    """
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        return half * tanh + half
    return 2 * half / (1 + tl.exp(-2 * half))
