"""The ops as `torch.library` custom ops: one registry for the model, vLLM and whatever else calls them.

`torch.ops.hstu.*` run in plain PyTorch on a CPU (`kernels.eager`) and as compiled kernels on a GPU, after `use(folder)`
said where `build-kernels` put them. Each has a fake implementation, so torch.compile and torch.export go through. The
same checks run on both: a bad call is a KernelError before anything is launched. Checking offsets and lengths reads
them, which on a GPU waits for the device: a caller that vouches for them passes checked=True.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kernels import eager
from kernels.artifacts import CompiledKernels
from kernels.embedding_bag import op as bag_op
from kernels.errors import KernelError
from kernels.hstu_attention import op as attention_op
from kernels.hstu_attention.op import RelativeBias
from kernels.interaction import op as interaction_op
from kernels.interaction.variants import num_pairs
from kernels.paged_hstu_attention import op as paged_op
from kernels.paged_hstu_attention.op import PagedBias
from kernels.spec import Launch
from kernels.uvqk_silu import op as uvqk_op

_compiled: dict[int, CompiledKernels] = {}
_folder: list[Path] = []


def use(folder: Path) -> None:
    """From now on GPU calls in this process take the kernels below `folder`, each device those of its SM."""
    _folder[:] = [folder]
    _compiled.clear()


def _run(*launches: Launch, device: torch.device) -> None:
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _compiled:
        if not _folder:
            raise KernelError(
                "no folder of compiled kernels is in use", expected="an artifact of build-kernels",
                fix="call kernels.ops.use(Path('artifacts/build-kernels')) once",
            )  # fmt: skip
        with torch.cuda.device(index):
            _compiled[index] = CompiledKernels(_folder[0])
    with torch.cuda.device(index):
        for launch in launches:
            _compiled[index].run(launch, torch.cuda.current_stream().cuda_stream)


def _relative(
    position_bias: Tensor | None, time_bias: Tensor | None, bucket_edges: Tensor | None, times: Tensor | None,
    next_times: Tensor | None,
) -> RelativeBias | None:  # fmt: skip
    if position_bias is None or time_bias is None or bucket_edges is None or times is None or next_times is None:
        if any(x is not None for x in (position_bias, time_bias, bucket_edges, times, next_times)):
            raise KernelError("a relative bias needs both tables, the bucket edges, times and next_times")
        return None
    return RelativeBias(
        position_bias=position_bias, time_bias=time_bias, bucket_edges=bucket_edges, times=times, next_times=next_times
    )


def _attention(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor | None, offsets: Tensor, num_targets: Tensor, longest: int,
    max_length: int, bias: RelativeBias | None, epsilon: float, checked: bool,
) -> Tensor:  # fmt: skip
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launch = attention_op.launch(
        q, k, v, out, offsets, num_targets, longest=longest, max_length=max_length, bias=bias, u=u, epsilon=epsilon,
        checked_offsets=checked,
    )  # fmt: skip
    if q.is_cuda:
        _run(launch, device=q.device)
        return out
    attended = eager.attention(q, k, v, offsets, num_targets, max_length, bias)
    return attended if u is None else eager.gate(u, attended, epsilon)


@torch.library.custom_op("hstu::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, num_targets: Tensor, longest: int, max_length: int,
    position_bias: Tensor | None = None, time_bias: Tensor | None = None, bucket_edges: Tensor | None = None,
    times: Tensor | None = None, next_times: Tensor | None = None, checked: bool = False,
) -> Tensor:  # fmt: skip
    """o [T, H, dv] of jagged q, k, v [T, H, ·] after SiLU; offsets int64 [B+1], num_targets int64 [B]."""
    bias = _relative(position_bias, time_bias, bucket_edges, times, next_times)
    return _attention(q, k, v, None, offsets, num_targets, longest, max_length, bias, 0.0, checked)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@torch.library.custom_op("hstu::gated_attention", mutates_args=())
def gated_attention(
    u: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, num_targets: Tensor, longest: int, max_length: int,
    position_bias: Tensor | None = None, time_bias: Tensor | None = None, bucket_edges: Tensor | None = None,
    times: Tensor | None = None, next_times: Tensor | None = None, epsilon: float = 1e-6, checked: bool = False,
) -> Tensor:  # fmt: skip
    """u ⊙ LN(o) [T, H, dv]: as `attention`, normalised over all heads and gated with u [T, H, dv]."""
    bias = _relative(position_bias, time_bias, bucket_edges, times, next_times)
    return _attention(q, k, v, u, offsets, num_targets, longest, max_length, bias, epsilon, checked)


@gated_attention.register_fake
def _(u: Tensor, q: Tensor, k: Tensor, v: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _paged(
    position_bias: Tensor | None, time_bias: Tensor | None, bucket_edges: Tensor | None, times: Tensor | None,
    next_times: Tensor | None, row_times: Tensor | None,
) -> PagedBias | None:  # fmt: skip
    bias = _relative(position_bias, time_bias, bucket_edges, times, next_times)
    if bias is None:
        return None
    return PagedBias(
        position_bias=bias.position_bias, time_bias=bias.time_bias, bucket_edges=bias.bucket_edges, times=bias.times,
        next_times=bias.next_times, row_times=row_times,
    )  # fmt: skip


@torch.library.custom_op("hstu::paged_decode", mutates_args=())
def paged_decode(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, longest: int, max_length: int,
    position_bias: Tensor | None = None, time_bias: Tensor | None = None, bucket_edges: Tensor | None = None,
    times: Tensor | None = None, next_times: Tensor | None = None, checked: bool = False,
) -> Tensor:  # fmt: skip
    """o [R, H, dv] of each request's newest event q [R, H, dqk], over vLLM's pages [pages, H, page, dqk + dv]."""
    bias = _paged(position_bias, time_bias, bucket_edges, times, next_times, None)
    out, splits, workspace = torch.empty_like(q), 1, None
    if q.is_cuda and q.shape[0]:
        sms = torch.cuda.get_device_properties(q.device).multi_processor_count
        splits = paged_op.num_splits(q.shape[0], q.shape[1], longest, sms)
        if splits > 1:
            workspace = torch.empty((*q.shape[:2], splits, q.shape[2]), dtype=torch.float32, device=q.device)
    launches = paged_op.decode(
        q, cache, out, table, lengths, longest=longest, max_length=max_length, bias=bias, splits=splits,
        workspace=workspace, checked=checked,
    )  # fmt: skip
    if q.is_cuda:
        _run(*launches, device=q.device)
        return out
    return eager.decode(q, cache, table, lengths, max_length, bias)


@paged_decode.register_fake
def _(q: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("hstu::paged_extend", mutates_args=())
def paged_extend(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, starts: Tensor, contexts: Tensor, num_targets: Tensor,
    table: Tensor, longest: int, max_length: int, position_bias: Tensor | None = None,
    time_bias: Tensor | None = None, bucket_edges: Tensor | None = None, times: Tensor | None = None,
    next_times: Tensor | None = None, row_times: Tensor | None = None, checked: bool = False,
) -> Tensor:  # fmt: skip
    """o [T, H, dv] of new rows after their cached events; the last num_targets of a request are candidates."""
    bias = _paged(position_bias, time_bias, bucket_edges, times, next_times, row_times)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launch = paged_op.extend(
        q, k, v, cache, out, starts, contexts, num_targets, table, longest=longest, max_length=max_length, bias=bias,
        checked=checked,
    )  # fmt: skip
    if q.is_cuda:
        _run(launch, device=q.device)
        return out
    return eager.extend(q, k, v, cache, starts, contexts, num_targets, table, max_length, bias)


@paged_extend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@torch.library.custom_op("hstu::cache_write", mutates_args=("cache",))
def cache_write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """k and v [T, H, d] stand in the pages at their slots int64 [T]; a row whose slot is negative stands nowhere."""
    launch = paged_op.write(k, v, cache, slots)
    if k.is_cuda:
        _run(launch, device=k.device)
    else:
        eager.write(k, v, cache, slots)


@cache_write.register_fake
def _(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    return None


@torch.library.custom_op("hstu::uvqk_silu", mutates_args=())
def uvqk_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(x weightᵀ + bias) [M, N] in bf16 or fp16; bias float32 [N]."""
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    launch = uvqk_op.launch(x, weight, bias, out)
    if x.is_cuda:
        _run(launch, device=x.device)
        return out
    return eager.uvqk_silu(x, weight, bias)


@uvqk_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


@torch.library.custom_op("hstu::uvqk_silu_int8", mutates_args=())
def uvqk_silu_int8(
    x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """SiLU((x weightᵀ) ∘ x_scale ⊗ weight_scale + bias) [M, N] of int8 x and weight, in bf16 or fp16."""
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    launch = uvqk_op.launch(x, weight, bias, out, (x_scale, weight_scale))
    if x.is_cuda:
        _run(launch, device=x.device)
        return out
    return eager.uvqk_silu_int8(x, weight, bias, (x_scale, weight_scale), dtype)


@uvqk_silu_int8.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    return torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)


@torch.library.custom_op("hstu::interaction", mutates_args=())
def interaction(x: Tensor, with_self: bool = False) -> Tensor:
    """The packed lower triangle [B, P] of the products of a sample's features x [B, F, D]."""
    out = torch.empty((x.shape[0], num_pairs(x.shape[1], with_self)), dtype=x.dtype, device=x.device)
    launch = interaction_op.launch(x, out, with_self=with_self)
    if x.is_cuda:
        _run(launch, device=x.device)
        return out
    return eager.interaction(x, with_self)


@interaction.register_fake
def _(x: Tensor, with_self: bool = False) -> Tensor:
    return torch.empty((x.shape[0], num_pairs(x.shape[1], with_self)), dtype=x.dtype, device=x.device)


@torch.library.custom_op("hstu::embedding_bag", mutates_args=())
def embedding_bag(table: Tensor, ids: Tensor, offsets: Tensor, checked: bool = False) -> Tensor:
    """Sums [B, D] of table rows ids[offsets[b] : offsets[b+1]], int64."""
    out = torch.empty((len(offsets) - 1, table.shape[1]), dtype=table.dtype, device=table.device)
    launch = bag_op.launch(table, ids, offsets, out, checked=checked)
    if table.is_cuda:
        _run(launch, device=table.device)
        return out
    return eager.embedding_bag(table, ids, offsets)


@embedding_bag.register_fake
def _(table: Tensor, ids: Tensor, offsets: Tensor, checked: bool = False) -> Tensor:
    return torch.empty((offsets.shape[0] - 1, table.shape[1]), dtype=table.dtype, device=table.device)
