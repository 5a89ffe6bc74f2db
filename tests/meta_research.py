"""Checkpoint files in exactly the format of Meta's research trainer, with random weights."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaShape:
    """The numbers a public config of Meta's consists of; N = max_sequence_len + 10 + 1."""

    embedding_dim: int
    num_layers: int
    num_heads: int
    head_dim: int  # dqk = dv
    max_length: int  # N
    item_rows: int  # with the padding row


PUBLIC_CONFIGS = {
    "ml-1m": MetaShape(embedding_dim=50, num_layers=2, num_heads=1, head_dim=50, max_length=211, item_rows=3953),
    "ml-1m-large": MetaShape(embedding_dim=50, num_layers=8, num_heads=2, head_dim=25, max_length=211, item_rows=3953),
    "ml-20m": MetaShape(embedding_dim=256, num_layers=4, num_heads=4, head_dim=64, max_length=211, item_rows=131263),
    "ml-20m-large": MetaShape(
        embedding_dim=256, num_layers=16, num_heads=8, head_dim=32, max_length=211, item_rows=131263
    ),
    "amzn-books": MetaShape(embedding_dim=64, num_layers=4, num_heads=4, head_dim=16, max_length=61, item_rows=695763),
    "amzn-books-large": MetaShape(
        embedding_dim=64, num_layers=16, num_heads=8, head_dim=8, max_length=61, item_rows=695763
    ),
}
SMALL = MetaShape(embedding_dim=12, num_layers=2, num_heads=2, head_dim=6, max_length=31, item_rows=41)


def meta_weights(shape: MetaShape = SMALL, *, seed: int = 0, prefix: str = "module.") -> OrderedDict[str, Tensor]:
    """`model_state_dict` with Meta's names, order and shapes; weights large enough that every table matters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 0.3) -> Tensor:
        return torch.empty(size).normal_(0.0, std, generator=generator)

    dim, length, width = shape.embedding_dim, shape.max_length, shape.num_heads * shape.head_dim
    weights: OrderedDict[str, Tensor] = OrderedDict()
    weights[f"{prefix}_attn_mask"] = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights[f"{prefix}_embedding_module._item_emb.weight"] = normal(shape.item_rows, dim, std=dim**-0.5)
    weights[f"{prefix}_input_features_preproc._pos_emb.weight"] = normal(length, dim)
    for index in range(shape.num_layers):
        layer = f"{prefix}_hstu._attention_layers.{index}."
        weights[layer + "_uvqk"] = normal(dim, 4 * width, std=dim**-0.5)
        weights[layer + "_rel_attn_bias._ts_w"] = normal(129)
        weights[layer + "_rel_attn_bias._pos_w"] = normal(2 * length - 1)
        weights[layer + "_o.weight"] = normal(dim, width, std=width**-0.5)
        weights[layer + "_o.bias"] = normal(dim)
    return weights


def write_meta_checkpoint(
    path: Path, shape: MetaShape = SMALL, *, seed: int = 0, weights: dict[str, Tensor] | None = None, epoch: int = 100
) -> Path:
    """A file as Meta's trainer saves it, at `path`; `weights` replaces the random ones."""
    state = meta_weights(shape, seed=seed) if weights is None else weights
    optimizer = {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}],
    }
    torch.save({"epoch": epoch, "model_state_dict": state, "optimizer_state_dict": optimizer}, path)
    return path
