"""HSTU inside vLLM: the same weights and mathematics as `hstu.model.HSTU`, one row per event, on paged KV.

Input rows are records (`serving.vllm_plugin.records`), so every embedding is looked up here. Two things live
by KV slot beside the pages: each event's own time and the time of the event after it. A generated item has no
record; it inherits the query time, which is the next_time of the event before it.
"""

# ruff: noqa: ARG002 — the signatures are vLLM's

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.sequence import IntermediateTensors

from hstu.checkpoints.huggingface import WEIGHTS
from hstu.config import L2_EPS, LAYER_NORM_EPS, NUM_TIME_BUCKETS, HSTUConfig
from hstu.model import l2_normalize, layer_norm
from hstu.time_buckets import time_buckets
from serving.slate import Slate, Slates
from serving.vllm_plugin.attention import HSTUAttentionBackend, HSTUMetadata
from serving.vllm_plugin.poolers import RetrievalPooler, UserEmbeddingPooler
from serving.vllm_plugin.records import Events, decode_records, encode_items
from serving.vllm_plugin.slate_search import Prefix, search

_loaded: WeakValueDictionary[tuple[str, int, int], HSTUForCausalLM] = WeakValueDictionary()


def _file_key(folder: Path) -> tuple[str, int, int] | None:
    """What tells one file of weights from another, None for a model that is no local folder."""
    file = folder / WEIGHTS
    if not file.is_file():
        return None
    found = file.stat()
    return str(file.resolve()), found.st_size, found.st_mtime_ns


class PagedHSTUAttention(nn.Module):
    """A layer's attention with this rank's heads: biases as in the checkpoint, keys and values in vLLM's pages."""

    def __init__(self, config: HSTUConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.num_ranks = get_tensor_model_parallel_world_size()
        self.num_heads = config.num_heads // self.num_ranks
        self.value_dim, self.all_values = self.num_heads * config.v_dim, config.num_heads * config.v_dim
        self.key_dim = self.num_heads * config.qk_dim
        self.config = config
        self.position_bias = nn.Parameter(torch.empty(2 * config.max_length - 1, dtype=torch.float32))
        self.time_bias = nn.Parameter(torch.empty(NUM_TIME_BUCKETS + 1, dtype=torch.float32))
        self.paged = Attention(
            self.num_heads,
            config.qk_dim,
            1.0,
            head_size_v=config.v_dim,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.paged",
            attn_backend=HSTUAttentionBackend,
            max_length=config.max_length,
            position_bias=self.position_bias,
            time_bias=self.time_bias,
        )

    def forward(self, uvqk: Tensor) -> Tensor:
        """Gated output u ⊙ LN(a·v) [T, this rank's H·dv] from the projection [T, W], before SiLU."""
        metadata = get_forward_context().attn_metadata
        step: HSTUMetadata | None = None if metadata is None else metadata[self.paged.layer_name]
        if step is not None and step.kernel is not None:
            # Where the norm needs the other ranks' values too, the kernel stops before it.
            attended = step.kernel.attend(uvqk, self.paged.kv_cache, self, gated=self.num_ranks == 1)
            return attended if self.num_ranks == 1 else F.silu(uvqk[:, : self.value_dim]) * self.norm(attended)
        u, v, q, k = F.silu(uvqk).split([self.value_dim, self.value_dim, self.key_dim, self.key_dim], dim=-1)
        return u * self.norm(self.paged(q.contiguous(), k.contiguous(), v.contiguous()))

    def norm(self, x: Tensor) -> Tensor:
        """LayerNorm over the values of all heads, those of the other ranks included."""
        if self.num_ranks == 1:
            return layer_norm(x)
        sums = torch.stack([x.float().sum(-1), x.float().square().sum(-1)], dim=-1)
        mean, square = (tensor_model_parallel_all_reduce(sums) / self.all_values).split(1, dim=-1)
        variance = (square - mean.square()).clamp(min=0)
        return ((x.float() - mean) * torch.rsqrt(variance + LAYER_NORM_EPS)).to(x.dtype)


class PagedHSTULayer(nn.Module):
    """One layer: x + W_o(attention(LN(x) · W_uvqk)), heads split over the tensor-parallel ranks."""

    def __init__(self, config: HSTUConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        values, keys = config.num_heads * config.v_dim, config.num_heads * config.qk_dim
        self.uvqk = MergedColumnParallelLinear(
            config.embedding_dim, [values, values, keys, keys], bias=False, prefix=f"{prefix}.uvqk", return_bias=False
        )
        self.attention = PagedHSTUAttention(config, vllm_config, f"{prefix}.attention")
        self.output = RowParallelLinear(values, config.embedding_dim, prefix=f"{prefix}.output", return_bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.around(x, self.attention)

    def around(self, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer with another attention in its place, from the projection to the gated output."""
        return x + self.output(attention(self.uvqk(layer_norm(x))))  # type: ignore[no-any-return]


class HSTUForCausalLM(nn.Module):
    """Generates items (the logits are cosines with every real item) and, as a pooling model, user embeddings."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config.shape
        self.dtype = vllm_config.model_config.dtype
        ranks = get_tensor_model_parallel_world_size()
        if config.num_heads % ranks:
            raise ValueError(f"{config.num_heads} heads cannot be split over {ranks} tensor-parallel ranks")
        # Tables stay float32 at every serving precision: rounded cosines would lose the order of close items.
        table = {"dtype": torch.float32}
        self.item_embedding = nn.Embedding(config.num_items + 1, config.embedding_dim, **table)
        self.position_embedding = nn.Embedding(config.max_length, config.embedding_dim, **table)
        if config.num_actions:
            self.action_embedding = nn.Embedding(config.num_actions, config.embedding_dim, **table)
        if config.num_gap_buckets:
            self.gap_embedding = nn.Embedding(config.num_gap_buckets, config.embedding_dim, **table)
        self.layers = nn.ModuleList(
            PagedHSTULayer(config, vllm_config, f"{prefix}layers.{index}") for index in range(config.num_layers)
        )
        in_own_process = envs.VLLM_ENABLE_V1_MULTIPROCESSING and multiprocessing.parent_process() is not None
        if vllm_config.model_config.enforce_eager and in_own_process:
            # In a process of vLLM's own, eager is eager everywhere: its sampler has one function under
            # torch.compile that would call for a C++ compiler at the first request with scores.
            torch.compiler.set_stance("force_eager")
        self.register_buffer("inverse_norms", torch.empty(config.num_items + 1, dtype=torch.float32), persistent=False)
        self.inverse_norms: Tensor
        self.slot_times: Tensor | None = None  # int64 [2, slots]: own time, next time
        self.last_step: HSTUMetadata | None = None  # for the slate search, which follows a step's forward
        self.pooler = DispatchPooler(
            {"embed": UserEmbeddingPooler(), "plugin": RetrievalPooler(self.compute_logits, self.search)}
        )
        self._weights_key = _file_key(Path(vllm_config.model_config.model))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Every parameter is filled from the tensor of its name; the task heads are not served here."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            if name.startswith("task_heads."):
                continue
            loader = getattr(parameters[name], "weight_loader", None)
            if loader is None:
                parameters[name].data.copy_(tensor)
            else:
                loader(parameters[name], tensor)
            loaded.add(name)
        norms = torch.linalg.vector_norm(self.item_embedding.weight.data, dim=-1)
        self.inverse_norms.copy_(1.0 / norms.clamp(min=L2_EPS))
        self._share_tables()
        return loaded

    def _share_tables(self) -> None:
        """One copy of the tables for the engines of a process that serve one file: pooling and generation, say."""
        if self._weights_key is None:
            return
        first = _loaded.setdefault(self._weights_key, self)
        if first is self or first.item_embedding.weight.device != self.item_embedding.weight.device:
            return
        for name, module in self.named_children():
            if isinstance(module, nn.Embedding):
                module.weight.data = getattr(first, name).weight.data
        self.inverse_norms = first.inverse_norms

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Records [T, RECORD_WIDTH] of bare item ids; ids out of the vocabulary count as padding."""
        known = (input_ids >= 0) & (input_ids <= self.config.num_items)
        return encode_items(torch.where(known, input_ids, 0).long(), dtype=self.dtype)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The state [T, D] after the last layer at every row of the step."""
        rows = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        events, step = decode_records(rows), self._step()
        self.last_step = step
        gaps = torch.zeros_like(positions)
        if step is not None:
            gaps = self._take_times(events, step)
        x = self._embed(events.item_ids, events.actions, positions, gaps).to(self.dtype)
        for layer in self.layers:
            x = layer(x)
        return x

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Cosines float32 [n, num_items + 1] of states [n, D] with every item; padding (id 0) is -inf."""
        cosines = l2_normalize(hidden_states.float()) @ self.item_embedding.weight.T * self.inverse_norms
        cosines[:, 0] = -torch.inf
        return cosines

    def search(self, state: Tensor, request: int, slate: Slate, history_items: list[int]) -> Slates:
        """The slates of one request of the step just run; state [D] is the one after its last event."""
        step, times = self.last_step, self.slot_times
        if step is None or times is None:
            raise RuntimeError("a slate search follows a step of the model")
        length = int(step.context[request]) + int(step.num_new[request])
        event = torch.arange(length, device=state.device)
        slots = step.table[request].long()[event // step.block_size] * step.block_size + event % step.block_size
        prefix = Prefix(
            step=step, request=request, length=length, query_time=int(times[1, slots[-1]]), times=times[0, slots]
        )
        return search(self, state, prefix, slate, history_items)

    def embed_chosen(self, item_ids: Tensor, position: int, gaps: Tensor) -> Tensor:
        """Input rows [n, D] of chosen items [n] at a position, `gaps` int64 [n] after the event before."""
        positions = torch.full_like(item_ids, position)
        return self._embed(item_ids, torch.zeros_like(item_ids), positions, gaps).to(self.dtype)

    def _embed(self, items: Tensor, actions: Tensor, positions: Tensor, gaps: Tensor) -> Tensor:
        config = self.config
        items = torch.where(items <= config.num_items, items, 0)
        x = self.item_embedding(items) * config.item_scale + self.position_embedding(positions)
        if config.num_actions:
            x = x + self.action_embedding(actions.clamp(max=config.num_actions - 1))
        if config.num_gap_buckets:
            x = x + self.gap_embedding(time_buckets(gaps).clamp(max=config.num_gap_buckets - 1))
        return x  # type: ignore[no-any-return]

    def _step(self) -> HSTUMetadata | None:
        """The plan of this step, None when vLLM only measures memory."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return None
        return metadata[self.layers[0].attention.paged.layer_name]  # type: ignore[no-any-return]

    def _take_times(self, events: Events, step: HSTUMetadata) -> Tensor:
        """The gap [T] to the event before each row; its times now stand at its slot and the plan has its buckets."""
        times_by_slot, next_by_slot = self._slot_times(step)
        has_context = step.context > 0
        # A bare item inherits the query time: next_time of the last event before it, in this step or in the cache.
        row = torch.arange(len(step.request), device=step.request.device)
        last_event = torch.where(events.has_times, row, -1).cummax(0).values
        before = torch.where(has_context, next_by_slot[step.previous_slot], 0)[step.request]
        in_step = last_event >= step.first[step.request]
        inherited = torch.where(in_step, events.next_times[last_event.clamp(min=0)], before)
        times = torch.where(events.has_times, events.times, inherited)
        next_times = torch.where(events.has_times, events.next_times, inherited)
        times_by_slot[step.slots] = times
        next_by_slot[step.slots] = next_times
        step.set_times(times_by_slot, next_times)
        previous = torch.where(has_context, times_by_slot[step.previous_slot], times[step.first])[step.request]
        is_first = row == step.first[step.request]
        return times - torch.where(is_first, previous, times.roll(1))

    def _slot_times(self, step: HSTUMetadata) -> Tensor:
        """int64 [2, slots], made when the number of pages is known."""
        num_slots = self.layers[0].attention.paged.kv_cache.shape[0] * step.block_size
        if self.slot_times is None or self.slot_times.shape[1] != num_slots:
            self.slot_times = torch.zeros(2, num_slots, dtype=torch.int64, device=step.slots.device)
        return self.slot_times
