"""What vLLM is measured against: the loops a PyTorch user would write for equal lengths, with nothing around them.

A batch of histories of one length, keys and values in one preallocated tensor, no scheduler, no pages, no constraint
but "no item twice". Biases are optional: without them the model is not Meta's, and the loop is cheaper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hstu.model import HSTU, History, HSTULayer, l2_normalize, layer_norm
from hstu.time_buckets import time_buckets

HIDDEN = -1e30  # SiLU of it is 0


class IdealLoop:
    """Greedy and beam slates of a batch with a dense KV cache."""

    def __init__(self, model: HSTU, *, biases: bool = True) -> None:
        self.model, self.config, self.biases = model, model.config, biases
        self.table = l2_normalize(model.item_embedding.weight[1:]).T.contiguous()

    def _split(self, layer: HSTULayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u [.., H·dv]; v, q, k [B, H, L, ·] of x [B, L, D]."""
        u, v, q, k = layer.attention.split(layer.project(x))
        return u, v.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2)

    def _bias(self, layer: HSTULayer, distance: Tensor, buckets: Tensor) -> Tensor:
        return layer.attention.position_bias[distance + self.config.max_length - 1] + layer.attention.time_bias[buckets]

    def _attend(
        self, layer: HSTULayer, x: Tensor, u: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> Tensor:
        scores = q @ k.transpose(2, 3)
        if bias is not None:
            scores += bias
        attended = (F.silu(scores, inplace=True) @ v).div_(self.config.max_length).transpose(1, 2).flatten(2)
        return x + layer.output(u * layer_norm(attended))

    def prefill(self, history: History, room: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The last state [B, D] and every layer's keys and values [B, H, L + room, ·]."""
        model = self.model
        length = history.item_ids.shape[1]
        position = torch.arange(length)
        distance = position - position.unsqueeze(1)
        hidden = torch.where(distance > 0, HIDDEN, 0.0)
        if self.biases:
            buckets = time_buckets(history.next_timestamps.unsqueeze(2) - history.timestamps.unsqueeze(1))
        x = model.embed_history(history)
        keys, values = [], []
        for layer in model.layers:
            u, v, q, k = self._split(layer, x)
            keys.append(k.new_empty(len(k), k.shape[1], length + room, k.shape[3]))
            values.append(v.new_empty(len(v), v.shape[1], length + room, v.shape[3]))
            keys[-1][:, :, :length], values[-1][:, :, :length] = k, v
            bias = (self._bias(layer, distance, buckets) + hidden).unsqueeze(1) if self.biases else hidden
            x = self._attend(layer, x, u, q, k, v, bias)
        return x[:, -1], keys, values

    def step(self, x: Tensor, keys: list[Tensor], values: list[Tensor], at: int, dt: Tensor | None) -> Tensor:
        """The state [B, D] of one event more at place `at`, x [B, 1, D]; dt [B, at + 1] its time to every event."""
        distance = torch.arange(at + 1) - at
        buckets = None if dt is None else time_buckets(dt)
        for layer, k, v in zip(self.model.layers, keys, values, strict=True):
            u, new_v, q, new_k = self._split(layer, x)
            k[:, :, at : at + 1], v[:, :, at : at + 1] = new_k, new_v
            bias = None if buckets is None else self._bias(layer, distance, buckets)[:, None, None]
            x = self._attend(layer, x, u, q, k[:, :, : at + 1], v[:, :, : at + 1], bias)
        return x[:, 0]

    def _next(self, items: Tensor, place: int, gaps: Tensor) -> Tensor:
        """x [B, 1, D] of chosen items [B] at a place."""
        actions = torch.zeros_like(items) if self.config.num_actions else None
        return self.model.embed(items, torch.tensor(place), actions, gaps).unsqueeze(1)

    @torch.inference_mode()
    def greedy(self, history: History, num_items: int) -> Tensor:
        """Item ids [B, n], no item twice."""
        length = history.item_ids.shape[1]
        state, keys, values = self.prefill(history, num_items)
        since = torch.cat(
            [history.query_time.unsqueeze(1) - history.timestamps, torch.zeros(len(state), num_items).long()], 1
        )
        forbidden = torch.zeros(len(state), self.config.num_items)
        chosen = []
        for step in range(num_items):
            scores = l2_normalize(state) @ self.table + forbidden
            items = scores.argmax(1)
            forbidden.scatter_(1, items.unsqueeze(1), -torch.inf)
            chosen.append(items + 1)
            if step + 1 < num_items:
                at = length + step
                gap = since[:, length - 1] if step == 0 else torch.zeros_like(items)
                dt = since[:, : at + 1] if self.biases else None
                state = self.step(self._next(items + 1, at, gap), keys, values, at, dt)
        return torch.stack(chosen, 1)

    @torch.inference_mode()
    def beams(self, history: History, num_items: int, width: int) -> tuple[Tensor, Tensor]:
        """One user's beams [W, n] and their log-probabilities [W], best first; the prefix is shared, suffixes move."""
        config, length = self.config, history.item_ids.shape[1]
        state, keys, values = self.prefill(history, 0)
        since = (history.query_time.unsqueeze(1) - history.timestamps)[0]
        logits = l2_normalize(state) @ self.table
        totals, items = logits.log_softmax(1)[0].topk(width)
        beams = items.unsqueeze(1)
        heads = config.num_heads
        suffix_k = [k.new_empty(width, heads, num_items, config.qk_dim) for k in keys]
        suffix_v = [v.new_empty(width, heads, num_items, config.v_dim) for v in values]
        prefix_buckets, own = time_buckets(since), torch.zeros(1, dtype=torch.int64)
        for step in range(1, num_items):
            at = length + step - 1
            gap = (since[-1] if step == 1 else own[0]).expand(width)
            x = self._next(items + 1, at, gap)
            for index, layer in enumerate(self.model.layers):
                u, v, q, k = self._split(layer, x)
                suffix_k[index][:, :, step - 1 : step], suffix_v[index][:, :, step - 1 : step] = k, v
                bias = self._bias(layer, torch.arange(length) - at, prefix_buckets)
                queries = q[:, :, 0].transpose(0, 1)  # [H, W, dqk]
                weights = F.silu(queries @ keys[index][0].transpose(1, 2) + bias, inplace=True)
                attended = (weights @ values[index][0]).transpose(0, 1)
                near_bias = self._bias(layer, torch.arange(step) - step + 1, own)
                near = F.silu(q @ suffix_k[index][:, :, :step].transpose(2, 3) + near_bias, inplace=True)
                attended = attended + (near @ suffix_v[index][:, :, :step])[:, :, 0]
                normed = layer_norm(attended.flatten(1) / config.max_length).unsqueeze(1)
                x = x + layer.output(u * normed)
            logits = l2_normalize(x[:, 0]) @ self.table
            logits.scatter_(1, beams, -torch.inf)
            totals, flat = (logits.log_softmax(1) + totals.unsqueeze(1)).flatten().topk(width)
            parents, items = flat // config.num_items, flat % config.num_items
            beams = torch.cat([beams[parents], items.unsqueeze(1)], 1)
            for cache in (*suffix_k, *suffix_v):
                cache[:, :, :step] = cache[parents, :, :step]
        return beams + 1, totals
