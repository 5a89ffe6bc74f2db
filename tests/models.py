"""Random models, histories and checkpoint artifacts, small enough to make in milliseconds.

Weights are large enough that every table, bias and mask changes the answer: a test that compares two
runtimes on these models fails when one of them drops a term.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hstu.artifact import Artifact, encode_json, write_manifest
from hstu.checkpoints.huggingface import save_pretrained
from hstu.config import TASKS, HSTUConfig
from hstu.data.histories import Histories
from hstu.data.vocabulary import Vocabulary
from hstu.model import HSTU

TINY = HSTUConfig(
    num_items=150,
    embedding_dim=16,
    num_layers=2,
    num_heads=2,
    qk_dim=6,
    v_dim=8,
    max_history=20,
    num_actions=4,
    num_gap_buckets=24,
    tasks=TASKS,
    head_dim=12,
)
TINY_RESEARCH = HSTUConfig(
    num_items=150, embedding_dim=16, num_layers=2, num_heads=2, qk_dim=8, v_dim=8, max_history=20
)


def tiny_config(**changes: Any) -> HSTUConfig:
    """`TINY` (actions, gaps and task heads) with some fields changed."""
    return replace(TINY, **changes)


def random_model(config: HSTUConfig = TINY, seed: int = 0) -> HSTU:
    """A model in eval mode with weights drawn from `seed`; projections keep the scale of their input."""
    generator = torch.Generator().manual_seed(seed)
    model = HSTU(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("uvqk.weight", "output.weight", "hidden.weight", "logits.weight")):
                std = parameter.shape[-1] ** -0.5
            elif name.startswith("item_embedding"):
                std = 1.0 / config.item_scale  # √D times this is of unit size, as the other inputs are
            else:
                std = 0.3  # tables and biases: large enough to matter
            parameter.normal_(0.0, std, generator=generator)
        model.item_embedding.weight[0] = 0.0
    return model.requires_grad_(False)


def random_histories(
    config: HSTUConfig = TINY, *, num_users: int = 8, seed: int = 0, lengths: list[int] | None = None
) -> Histories:
    """Histories with real-looking times (seconds); by default lengths are 1, the longest allowed, and mixed.

    Every third user has no query time; pass `lengths` to fix the number of events of each user (0 allowed).
    """
    rng = np.random.default_rng(seed)
    if lengths is None:
        mixed = rng.integers(1, config.max_history + 1, size=num_users).tolist()
        lengths = [1, config.max_history, *mixed][:num_users]
    num_users, total = len(lengths), sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    gaps = np.exp(rng.uniform(0.0, 14.0, size=total)).astype(np.int64) * (rng.random(total) > 0.1)
    timestamps = np.zeros(total, dtype=np.int64)
    query_time = np.zeros(num_users, dtype=np.int64)
    for row, (start, end) in enumerate(itertools.pairwise(offsets)):
        timestamps[start:end] = 1_600_000_000 + np.cumsum(gaps[start:end])
        if row % 3 != 2:
            query_time[row] = (timestamps[end - 1] if end > start else 1_600_000_000) + int(rng.integers(0, 100_000))
    return Histories(
        item_ids=rng.integers(1, config.num_items + 1, size=total),
        actions=rng.integers(0, max(1, config.num_actions), size=total),
        timestamps=timestamps,
        offsets=offsets,
        query_time=query_time,
        target_item=rng.integers(1, config.num_items + 1, size=num_users),
        target_outcomes=rng.integers(0, 2, size=(num_users, len(config.tasks))).astype(np.int8),
    )


def random_candidates(config: HSTUConfig, *, num_users: int, num_candidates: int, seed: int = 0) -> Any:
    """candidate_ids int64 [B, C]."""
    return np.random.default_rng(seed).integers(1, config.num_items + 1, size=(num_users, num_candidates))


def write_checkpoint(
    folder: Path, model: HSTU | None = None, *, num_users: int = 32, seed: int = 0, source: str = "reference"
) -> Artifact:
    """A checkpoint artifact at `folder`, with the files that the checkpoint stage writes."""
    model = random_model() if model is None else model
    folder.mkdir(parents=True, exist_ok=True)
    save_pretrained(model, folder)
    items = tuple(str(item) for item in range(1, model.config.num_items + 1))
    actions = tuple(f"action-{action}" for action in range(1, model.config.num_actions))
    Vocabulary(items=items, actions=actions).save(folder / "vocabulary.json")
    random_histories(model.config, num_users=num_users, seed=seed + 1).save(folder / "calibration.npz")
    random_histories(model.config, num_users=num_users, seed=seed + 2).save(folder / "evaluation.npz")
    (folder / "checkpoint.json").write_bytes(encode_json({"source": source, "histories": "drawn", "epoch": None}))
    return write_manifest(folder, stage="checkpoint", params={"source": source}, inputs={}, toolchain={})
