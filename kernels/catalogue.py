"""Every Triton kernel that can be compiled ahead of time."""

from __future__ import annotations

from collections.abc import Sequence

from kernels.embedding_bag import variants as embedding_bag
from kernels.hstu_attention import variants as hstu_attention
from kernels.interaction import variants as interaction
from kernels.paged_hstu_attention import variants as paged_hstu_attention
from kernels.spec import Kernel
from kernels.uvqk_silu import variants as uvqk_silu

OPS = ("hstu_attention", "paged_hstu_attention", "uvqk_silu", "interaction", "embedding_bag")


def catalogue(dtypes: Sequence[str], head_dims: Sequence[int], ops: Sequence[str] = OPS) -> list[Kernel]:
    """The kernels of these types, head sizes and ops, by name; names are unique."""
    kernels: list[Kernel] = []
    for dtype in dtypes:
        for head_dim in head_dims:
            kernels += hstu_attention.variants(dtype, head_dim)
            kernels += paged_hstu_attention.variants(dtype, head_dim)
        for module in (uvqk_silu, interaction, embedding_bag):
            kernels += module.variants(dtype)
    return sorted((kernel for kernel in kernels if kernel.op in ops), key=lambda kernel: kernel.name)
