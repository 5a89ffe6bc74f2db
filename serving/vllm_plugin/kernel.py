"""Who attends in vLLM, and the bundle's paged attention kernel behind vLLM's step plan.

A bundle holds `runtime/libhstu_paged.so`, compiled when it was packed. Which of the two attends is said in the log at
every start; `additional_config={"hstu_attention": "kernel"}` (or "ops", "torch") asks for one by name. On a GPU the
paged ops attend where `hstu_gpu_kernels` names what build-kernels made.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger

from hstu.config import LAYER_NORM_EPS, HSTUConfig
from hstu.time_buckets import THRESHOLDS
from kernels import ops
from kernels.errors import KernelError
from kernels.paged_hstu_attention.cpu import LIBRARY, PagedCall, PagedLibrary, openmp_region
from serving.vllm_plugin import paged_ops

RUNTIME_FOLDER = "runtime"  # of a bundle
OPTION = "hstu_attention"
_EDGES = torch.tensor([0, *THRESHOLDS, 2**63 - 1], dtype=torch.int64)

logger = init_logger(f"vllm.{__name__}")


class Biases(Protocol):
    """What a layer's attention knows: tables float32 [2N - 1] and [129], and its share of the heads."""

    config: HSTUConfig
    num_heads: int
    position_bias: Tensor
    time_bias: Tensor


class PagedKernel:
    """The library and the threads it runs on: those that torch has."""

    def __init__(self, path: Path) -> None:
        self.library = PagedLibrary(path)
        self.region = openmp_region(next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), Path("libgomp")))


@cache
def _open(path: Path) -> PagedKernel:
    return PagedKernel(path)


def choose_attention(vllm_config: VllmConfig) -> PagedKernel | Literal["ops", "torch"]:
    """Who attends: the served folder's kernel, the paged ops, or PyTorch; ValueError when one asked for cannot."""
    options = vllm_config.additional_config or {}
    asked = options.get(OPTION, "auto")
    if asked not in ("auto", "kernel", "ops", "torch"):
        raise ValueError(f"additional_config: {OPTION} is {asked!r}, expected auto, kernel, ops or torch")
    if asked == "torch":
        logger.info_once("HSTU attention: PyTorch, as asked for")
        return "torch"
    device = vllm_config.device_config.device_type
    if asked == "ops" or (asked == "auto" and device != "cpu"):
        shape = vllm_config.model_config.hf_config.shape
        why = paged_ops.why_not(device, options.get(paged_ops.GPU_KERNELS), qk_dim=shape.qk_dim, v_dim=shape.v_dim)
        if not why:
            if device != "cpu":
                ops.use(Path(options[paged_ops.GPU_KERNELS]))
            logger.info_once("HSTU attention: paged ops on %s", device)
            return "ops"
    else:
        kernel = _open_kernel(Path(vllm_config.model_config.model) / RUNTIME_FOLDER / LIBRARY, device)
        if isinstance(kernel, PagedKernel):
            logger.info_once("HSTU attention: fused kernel (%s)", kernel.library.isa)
            return kernel
        why = kernel
    if asked != "auto":
        raise ValueError(f"{OPTION} is {asked!r}, and it cannot be had: {why}; pass 'auto' or bundle again")
    logger.warning_once("HSTU attention: PyTorch, several times slower than a kernel, since %s", why)
    return "torch"


def _open_kernel(path: Path, device: str) -> PagedKernel | str:
    """The CPU kernel, or why there is none."""
    if device != "cpu":
        return "the kernel is for the CPU"
    if not path.is_file():
        return f"there is no {path}"
    try:
        return _open(path)
    except KernelError as error:
        return str(error)


class KernelPlan:
    """One step for the kernel; every layer's call differs only in its rows, pages and biases."""

    def __init__(
        self,
        kernel: PagedKernel,
        slots: Tensor,
        first: Tensor,
        num_new: Tensor,
        context: Tensor,
        table: Tensor,
        block_size: int,
    ) -> None:
        sizes = num_new * (context + num_new)
        starts = sizes.cumsum(0) - sizes
        self.kernel, self.table, self.block_size = kernel, table, block_size
        self._buckets = torch.empty(int(sizes.sum()), dtype=torch.uint8)
        self._kept = (slots, first, num_new, context, table, starts)  # alive as long as their addresses are used
        self._call = PagedCall(
            rows=len(slots), requests=len(num_new), block=block_size, slots=slots.data_ptr(), first=first.data_ptr(),
            num_new=num_new.data_ptr(), context=context.data_ptr(), table=table.data_ptr(),
            table_stride=table.stride(0), buckets=self._buckets.data_ptr(), bucket_start=starts.data_ptr(),
            edges=_EDGES.data_ptr(), epsilon=LAYER_NORM_EPS, threads=torch.get_num_threads(), parallel=kernel.region,
        )  # fmt: skip

    def set_times(self, times: Tensor, next_times: Tensor) -> None:
        """The step's time buckets stand, from the times by slot and next_times [T] by row, both int64."""
        next_times = next_times.contiguous()
        self._call.times, self._call.next_times = times.data_ptr(), next_times.data_ptr()
        self.kernel.library.buckets(ctypes.byref(self._call))

    def attend(self, uvqk: Tensor, pages: Tensor, layer: Biases, *, gated: bool) -> Tensor:
        """u ⊙ LN(attended) (or attended alone) [T, H·dv] of rows uvqk [T, W] before SiLU; their pages are written."""
        _fill(self._call, uvqk, pages, layer)
        out = torch.empty(len(uvqk), layer.num_heads * layer.config.v_dim, dtype=uvqk.dtype)
        self._call.out, self._call.gated = out.data_ptr(), int(gated)
        self.kernel.library.attention(ctypes.byref(self._call))
        return out


class BeamPlan:
    """The steps of a beam search over the pages of one request of a step."""

    def __init__(self, plan: KernelPlan, request: int, buckets: Tensor) -> None:
        """buckets int64 [length]: of the query time and the time of each event of the request."""
        self._library = plan.kernel.library
        self._buckets, self._zero = buckets.to(torch.uint8), torch.zeros(1, dtype=torch.int64)
        self._table = plan.table[request].contiguous()
        self._context, self._num_new = torch.tensor([len(buckets)]), torch.zeros(1, dtype=torch.int64)
        self._call = PagedCall(
            requests=1, block=plan.block_size, first=self._zero.data_ptr(), num_new=self._num_new.data_ptr(),
            context=self._context.data_ptr(), table=self._table.data_ptr(), table_stride=len(self._table),
            buckets=self._buckets.data_ptr(), bucket_start=self._zero.data_ptr(), epsilon=LAYER_NORM_EPS, gated=1,
            threads=torch.get_num_threads(), parallel=plan.kernel.region,
        )  # fmt: skip

    def attend(self, uvqk: Tensor, pages: Tensor, layer: Biases, suffix: Tensor, ancestors: Tensor) -> Tensor:
        """u ⊙ LN(attended) [W, H·dv] of beams uvqk [W, ·]; their key and value stand in `suffix` at ancestors[:, -1].

        suffix [rows, H, dqk + dv]; ancestors int64 [W, s], contiguous: the suffix rows that a beam sees, its own last.
        """
        call = self._call
        _fill(call, uvqk, pages, layer)
        out = torch.empty(len(uvqk), layer.num_heads * layer.config.v_dim, dtype=uvqk.dtype)
        self._num_new[0] = call.rows = len(uvqk)
        call.num_suffix, call.ancestors, call.suffix = ancestors.shape[1], ancestors.data_ptr(), suffix.data_ptr()
        call.out = out.data_ptr()
        self._library.attention(ctypes.byref(call))
        return out


def _fill(call: PagedCall, uvqk: Tensor, pages: Tensor, layer: Biases) -> None:
    """The call has the rows, pages and tables of a layer."""
    if not pages.is_contiguous() or pages.dtype != uvqk.dtype or uvqk.stride(1) != 1:
        raise ValueError(f"pages of {pages.dtype} {tuple(pages.shape)} do not fit rows of {uvqk.dtype}")
    config = layer.config
    call.heads, call.qk_dim, call.v_dim = layer.num_heads, config.qk_dim, config.v_dim
    call.max_length, call.bfloat16 = config.max_length, int(uvqk.dtype == torch.bfloat16)
    call.uvqk, call.row_stride, call.pages = uvqk.data_ptr(), uvqk.stride(0), pages.data_ptr()
    call.position_bias, call.time_bias = layer.position_bias.data_ptr(), layer.time_bias.data_ptr()
