"""HSTU's pointwise attention on vLLM's paged KV cache.

    o_i = Σ_{j <= i} SiLU(q_i · k_j + position_bias[j - i] + time_bias[bucket(t_{i+1} - t_j)]) / N · v_j

The metadata builder plans a step of the scheduler once, for all layers: for the bundle's own kernel
(`serving.vllm_plugin.kernel`), for the paged ops that GPU kernels stand behind (`serving.vllm_plugin.paged_ops`), or,
where neither is there, for PyTorch. In PyTorch requests of similar shape are attended together, padded: there is no
softmax, so padding and pages in any order simply add nothing.
"""

# ruff: noqa: ARG002, ARG004 — the signatures are vLLM's

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from hstu.time_buckets import time_buckets
from serving.vllm_plugin.kernel import KernelPlan, PagedKernel, choose_attention
from serving.vllm_plugin.paged_ops import OpsPlan, write

PADDING = 1.25  # a group may be this many times larger than what is real in it
HIDDEN = -1e30  # a bias that hides an event: SiLU of it is 0 exactly, whatever the score
GROUP_SCORES = 1 << 21  # scores (requests · queries · keys · heads) attended at once: about 8 MiB of float32


@dataclass
class Group:
    """Requests attended together: B requests of up to Q new rows over up to L events, padded.

    rows int64 [B·Q]: place of each new row in the step, a request's first where it has no more;
    real int64 [n]: which of these stand for a row, None when all do;
    pages int64 [B, P], None when every event of these requests is new in this step;
    page_heads int64 [B·H·P]: the pages' places in a cache seen as [pages · heads, ·];
    padding (int64 [n], int64 [n]): request and place of the keys past a request's last, for groups with pages;
    distance int64 [B·Q·L]: j - i + N - 1, or 2N - 1 where a row may not see an event;
    buckets int64 [B·Q·L]: time buckets, set by the model.
    """

    num_requests: int
    num_queries: int
    length: int
    rows: Tensor
    real: Tensor | None
    pages: Tensor | None
    page_heads: Tensor | None
    padding: tuple[Tensor, Tensor] | None
    distance: Tensor
    buckets: Tensor | None = None


@dataclass
class HSTUMetadata(AttentionMetadata):  # type: ignore[misc]
    """One step: T rows of R requests. slots int64 [T] (0, vLLM's null page, where a row is not to be kept).

    request int64 [T]: which request a row is of; first int64 [R]: a request's first row in the step;
    context int64 [R]: its events before that; previous_slot int64 [R]: the slot of the last of them.
    num_new int64 [R]; table int32 [R, pages]. `kernel`, `ops` and `groups` are the plans of those
    that may attend; one of them is there.
    """

    slots: Tensor
    request: Tensor
    first: Tensor
    context: Tensor
    previous_slot: Tensor
    num_new: Tensor
    table: Tensor
    kernel: KernelPlan | None
    ops: OpsPlan | None
    groups: list[Group]
    block_size: int

    def set_times(self, times: Tensor, next_times: Tensor) -> None:
        """Time buckets of every group from the times [number of slots] by slot and next_times [T] by row."""
        if self.kernel is not None:
            self.kernel.set_times(times, next_times)
        if self.ops is not None:
            self.ops.set_times(times, next_times)
        by_page = times.view(-1, self.block_size)
        for group in self.groups:
            if group.pages is None:
                key_times = times[self.slots][group.rows].view(group.num_requests, group.length)
            else:
                key_times = by_page[group.pages].flatten(1)[:, : group.length]
            query_times = next_times[group.rows].view(group.num_requests, group.num_queries)
            group.buckets = time_buckets(query_times.unsqueeze(2) - key_times.unsqueeze(1)).flatten()


class HSTUMetadataBuilder(AttentionMetadataBuilder[HSTUMetadata]):  # type: ignore[misc]
    """Plans a step on the host; one plan serves every layer."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.num_heads = kv_cache_spec.num_kv_heads
        self.block_size = kv_cache_spec.block_size
        self.max_length = vllm_config.model_config.hf_config.shape.max_length
        self.attends = choose_attention(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> HSTUMetadata:
        """The plan of a step; requests of similar shape share a group."""
        common = common_attn_metadata
        starts = common.query_start_loc_cpu
        num_new = starts.diff().long()
        upper = common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens.cpu() if upper is None else upper)[: len(num_new)].long()
        device = common.slot_mapping.device
        first, context = starts[:-1].long().to(device), (lengths - num_new).to(device)
        table, last = common.block_table_tensor[: len(num_new)], (context - 1).clamp(min=0)
        page = table.gather(1, (last // self.block_size).unsqueeze(1)).squeeze(1).long()
        slots = common.slot_mapping[: common.num_actual_tokens].long().clamp(min=0)
        kernel, ops, groups = None, None, []
        if isinstance(self.attends, PagedKernel):
            kernel = KernelPlan(self.attends, slots, first, num_new, context, table, self.block_size)
        elif self.attends == "ops":
            longest = {"longest_new": int(num_new.max()), "longest": int(lengths.max())}
            ops = OpsPlan(slots, first, num_new, context, table, max_length=self.max_length, **longest)
        else:
            new, seen = num_new.tolist(), lengths.tolist()
            groups = [
                self._group(members, new, seen, first, context, table)
                for members in group_requests(new, seen, self.num_heads)
            ]
        return HSTUMetadata(
            slots=slots,
            request=torch.repeat_interleave(num_new.to(device)),
            first=first,
            context=context,
            previous_slot=page * self.block_size + last % self.block_size,
            num_new=num_new,
            table=table,
            kernel=kernel,
            ops=ops,
            groups=groups,
            block_size=self.block_size,
        )

    def _group(
        self, members: list[int], num_new: list[int], lengths: list[int], first: Tensor, context: Tensor, table: Tensor
    ) -> Group:
        device = first.device
        new = torch.tensor([num_new[m] for m in members], device=device)
        seen = torch.tensor([lengths[m] for m in members], device=device)
        index = torch.tensor(members, device=device)
        num_queries, length = max(num_new[m] for m in members), max(lengths[m] for m in members)
        query = torch.arange(num_queries, device=device)
        key = torch.arange(length, device=device)
        is_row = query < new.unsqueeze(1)
        position = context[index].unsqueeze(1) + query
        distance = key - position.unsqueeze(2)
        visible = (distance <= 0) & is_row.unsqueeze(2)
        pages = page_heads = padding = None
        if any(num_new[m] < lengths[m] for m in members):
            pages = table[index, : -(-length // self.block_size)].long()
            heads = torch.arange(self.num_heads, device=device).unsqueeze(1)
            page_heads = (pages.unsqueeze(1) * self.num_heads + heads).flatten()
            padding = torch.nonzero(key >= seen.unsqueeze(1), as_tuple=True)
        return Group(
            num_requests=len(members),
            num_queries=num_queries,
            length=length,
            rows=torch.where(is_row, first[index].unsqueeze(1) + query, first[index].unsqueeze(1)).flatten(),
            real=None if all(num_new[m] == num_queries for m in members) else is_row.flatten().nonzero().squeeze(1),
            pages=pages,
            page_heads=page_heads,
            padding=padding,
            distance=torch.where(visible, distance + self.max_length - 1, 2 * self.max_length - 1).flatten(),
        )


def group_requests(num_new: list[int], lengths: list[int], num_heads: int) -> list[list[int]]:
    """Requests in groups of little padding: each at most `PADDING` times its real size and `GROUP_SCORES` scores.

    A request that is new as a whole is never put with one that has events in the cache: it needs no pages.
    """
    order = sorted(range(len(lengths)), key=lambda r: (num_new[r] < lengths[r], -num_new[r], -lengths[r], r))
    groups: list[list[int]] = []
    real = queries = keys = 0
    for request in order:
        if num_new[request] == 0:
            continue
        area = num_new[request] * lengths[request]
        if groups:
            head = groups[-1][0]
            padded = (len(groups[-1]) + 1) * queries * max(keys, lengths[request])
            same_kind = (num_new[head] < lengths[head]) == (num_new[request] < lengths[request])
            if same_kind and padded <= PADDING * (real + area) and padded * num_heads <= GROUP_SCORES:
                groups[-1].append(request)
                real, keys = real + area, max(keys, lengths[request])
                continue
        groups.append([request])
        real, queries, keys = area, num_new[request], lengths[request]
    return groups


class HSTUAttentionImpl(AttentionImpl[HSTUMetadata]):  # type: ignore[misc]
    """One layer's attention over the groups of a step."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        *,
        max_length: int,
        position_bias: Tensor,
        time_bias: Tensor,
    ) -> None:
        unsupported = (alibi_slopes, sliding_window, logits_soft_cap, kv_sharing_target_layer_name)
        if any(unsupported) or attn_type != "decoder" or num_heads != num_kv_heads or scale != 1.0:
            raise ValueError("HSTU attention is causal, unscaled and has as many key heads as query heads")
        self.num_heads = self.num_kv_heads = num_heads
        self.head_size, self.scale = head_size, scale
        self.kv_cache_dtype = kv_cache_dtype
        self.max_length = max_length
        self.position_bias, self.time_bias = position_bias, time_bias

    def do_kv_cache_update(
        self, layer: AttentionLayer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Keys [T, H, dqk] and values [T, H, dv] stand in the pages [blocks, H, block, dqk + dv] at their slots."""
        if kv_cache.is_cuda and kv_cache.shape[-1] == 2 * key.shape[-1]:
            write(key[: len(slot_mapping)], value[: len(slot_mapping)], kv_cache, slot_mapping.long())
            return
        slots = slot_mapping.long().clamp(min=0).unsqueeze(1)
        _, heads, block_size, width = kv_cache.shape
        head = torch.arange(heads, device=slots.device)
        places = (slots // block_size * heads + head) * block_size + slots % block_size
        rows = torch.cat([key[: len(slots)], value[: len(slots)]], dim=-1).to(kv_cache.dtype)
        kv_cache.view(-1, width).index_copy_(0, places.flatten(), rows.flatten(0, 1))

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: HSTUMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write Σ SiLU(q·k + bias) / N · v into `output` [T, H, dv]; zeros when vLLM only measures memory."""
        if attn_metadata is None:
            return output.zero_()
        if attn_metadata.ops is not None:
            rows = len(attn_metadata.slots)
            output[:rows] = attn_metadata.ops.attend(
                query[:rows], key[:rows], value[:rows], kv_cache, self.position_bias, self.time_bias
            )
            return output
        position_bias = F.pad(self.position_bias, (0, 1), value=HIDDEN)
        for group in attn_metadata.groups:
            attended = self._attend(group, query, key, value, kv_cache, position_bias).to(output.dtype).flatten(0, 1)
            if group.real is None:
                output.index_copy_(0, group.rows, attended)
            else:
                output.index_copy_(0, group.rows[group.real], attended[group.real])
        return output

    def _attend(
        self, group: Group, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, position_bias: Tensor
    ) -> Tensor:
        """Attended values float32 [B, Q, H, dv] of a group."""

        def by_head(rows: Tensor) -> Tensor:
            return rows.index_select(0, group.rows).unflatten(0, (group.num_requests, -1)).transpose(1, 2)

        if group.page_heads is None:
            k, v = by_head(key), by_head(value)
        else:
            pages = kv_cache.flatten(0, 1).index_select(0, group.page_heads)  # [B · H · P, block, dqk + dv]
            events = pages.view(group.num_requests, self.num_heads, -1, pages.shape[-1])[:, :, : group.length]
            if group.padding is not None:  # what stands after a history's end may be anything, and 0 · NaN is NaN
                events[group.padding[0], :, group.padding[1]] = 0.0
            k, v = events[..., : self.head_size], events[..., self.head_size :]
        bias = position_bias.index_select(0, group.distance) + self.time_bias.index_select(0, group.buckets)
        scores = (by_head(query) @ k.transpose(2, 3)).float()
        weights = F.silu(scores.add_(bias.view(-1, 1, *scores.shape[2:])), inplace=True)
        return ((weights.to(v.dtype) @ v).float() / self.max_length).transpose(1, 2)


class HSTUAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """Registered as CUSTOM and named by the model: the CPU platform ignores backend selection."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HSTUAttentionImpl]:
        return HSTUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[HSTUMetadataBuilder]:
        return HSTUMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)
