"""Eager PyTorch as its user would improve it: no padding in products, the last layer for one event alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hstu.model import HSTU, History, HSTULayer, layer_norm
from hstu.signature import num_results
from hstu.time_buckets import time_buckets


class Featured:
    """`retrieve` of a model with the two rewrites that surgery makes of its graph, in eager PyTorch.

    Packing: everything but the attention runs on the rows of real events. Last position: the answer depends on the
    last layer's state at one event, so that layer needs k and v of all events, but q, u, attention and output of one.
    """

    def __init__(self, model: HSTU) -> None:
        self.model = model
        c, last = model.config, model.layers[-1]
        assert isinstance(last, HSTULayer)
        hv, hqk = c.num_heads * c.v_dim, c.num_heads * c.qk_dim
        u, v, q, k = last.uvqk.weight.detach().split([hv, hv, hqk, hqk])
        self.last, self.of_all, self.of_one = last, torch.cat([v, k]), torch.cat([u, q])
        self.widths = [hv, hqk]

    def retrieve(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """user_embedding [B, D], top_item_ids int64 [B, K], top_scores [B, K]; of every history at least one event."""
        model, lengths = self.model, history.lengths
        inside = torch.arange(history.item_ids.shape[1]) < lengths.unsqueeze(1)

        def pad(rows: Tensor) -> Tensor:
            padded = rows.new_zeros(*inside.shape, rows.shape[-1])
            padded[inside] = rows
            return padded

        next_times = history.next_timestamps
        buckets = time_buckets(next_times.unsqueeze(2) - history.timestamps.unsqueeze(1))
        x = model.embed_history(history)[inside]
        for layer in model.layers[:-1]:
            x = x + layer.output(layer.attention(pad(layer.project(x)), buckets, lengths)[inside])
        at = lengths.cumsum(0) - 1  # the row of each user's last event
        users = torch.arange(len(lengths))
        embedding = model.user_embedding(
            self._last_state(x, x[at], pad, buckets[users, lengths - 1], lengths).unsqueeze(1), torch.ones_like(lengths)
        )
        scores, columns = model.item_scores(embedding).topk(num_results(model.config))
        return embedding, columns + 1, scores

    def _last_state(self, x: Tensor, one: Tensor, pad: object, buckets: Tensor, lengths: Tensor) -> Tensor:
        """The state [B, D] after the last layer at the last events `one` [B, D] among all rows x [T, D]."""
        assert callable(pad)
        attention, heads = self.last.attention, (self.model.config.num_heads, -1)
        rows = pad(F.silu(F.linear(layer_norm(x), self.of_all)))
        v, k = (part.unflatten(-1, heads) for part in rows.split(self.widths, dim=-1))
        u, q = F.silu(F.linear(layer_norm(one), self.of_one)).split(self.widths, dim=-1)
        position = torch.arange(rows.shape[1])
        distance = (position - (lengths - 1).unsqueeze(1)).clamp(max=0)  # j - i
        mask = (position < lengths.unsqueeze(1)).to(x.dtype)
        bias = attention.relative_bias(distance, buckets)
        attended = attention.attend(q.unflatten(-1, heads).unsqueeze(1), k, v, bias.unsqueeze(1), mask.unsqueeze(1))
        return one + self.last.output(u * layer_norm(attended.flatten(-2).squeeze(1)))  # type: ignore[no-any-return]
