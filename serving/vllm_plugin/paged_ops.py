"""A step through the paged ops of the registry (`torch.ops.hstu`): the Triton kernels on a GPU, plain PyTorch on a CPU.

The plan is made of the same tensors as the CPU kernel's. Decodes take an op of their own; a step in which any request
has several new rows goes through the other one. The ops are held against the CPU kernel here; on a GPU nothing of it
has run. CUDA graphs stay off: a step makes its tensors anew, and how a decode is split is a number on the host.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hstu.time_buckets import THRESHOLDS
from kernels import ops
from kernels.hstu_attention.op import bucket_edges

GPU_KERNELS = "hstu_gpu_kernels"  # of vLLM's additional_config: an artifact of build-kernels


def why_not(device: str, folder: str | None, *, qk_dim: int, v_dim: int) -> str:
    """Why these ops cannot attend here; empty when they can."""
    if qk_dim != v_dim:
        return f"the paged ops take keys and values of one size, not {qk_dim} and {v_dim}"
    if device == "cuda" and folder is None:
        return f"additional_config names no folder of compiled kernels ({GPU_KERNELS})"
    if device == "cuda" and not Path(folder or "").is_dir():
        return f"there is no folder {folder}"
    return ""


class OpsPlan:
    """One step for the paged ops; every layer's call differs only in its rows, pages and biases."""

    def __init__(
        self,
        slots: Tensor,
        first: Tensor,
        num_new: Tensor,
        context: Tensor,
        table: Tensor,
        *,
        longest_new: int,
        longest: int,
        max_length: int,
    ) -> None:
        """slots [T], first, context [R] int64, num_new int64 [R] on the host, table int32 [R, pages]."""
        self.slots, self.max_length = slots, max_length
        self.longest_new, self.longest = longest_new, longest
        self.contexts, self.table = context.int(), table
        self.lengths = (context + num_new.to(context.device)).int()
        self.starts = torch.cat([first, first.new_full((1,), len(slots))]).int()
        self.no_targets = torch.zeros_like(self.contexts)
        self.edges = bucket_edges(THRESHOLDS).to(slots.device)
        self.times: Tensor | None = None
        self.next_times: Tensor | None = None

    def set_times(self, times: Tensor, next_times: Tensor) -> None:
        """The times by slot and next_times [T] by row, both int64, stand for the step's layers."""
        self.times, self.next_times = times, next_times.contiguous()
        self.row_times = times[self.slots]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Tensor, position_bias: Tensor, time_bias: Tensor
    ) -> Tensor:
        """o [T, H, dv] of new rows q, k [T, H, dqk], v [T, H, dv], whose keys and values are in the pages too."""
        if self.longest_new == 1:
            return ops.paged_decode(  # type: ignore[no-any-return]
                q, pages, self.table, self.lengths, self.longest, self.max_length, position_bias, time_bias, self.edges,
                self.times, self.next_times, True,
            )  # fmt: skip
        return ops.paged_extend(  # type: ignore[no-any-return]
            q, k, v, pages, self.starts, self.contexts, self.no_targets, self.table, self.longest_new, self.max_length,
            position_bias, time_bias, self.edges, self.times, self.next_times, self.row_times, True,
        )  # fmt: skip


def write(k: Tensor, v: Tensor, pages: Tensor, slots: Tensor) -> None:
    """k, v [T, H, ·] stand in the pages at their slots int64 [T]; a row whose slot is negative stands nowhere."""
    ops.cache_write(k, v, pages, slots)
