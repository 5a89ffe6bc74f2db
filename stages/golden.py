"""Golden inputs and outputs: what a bundle must still answer on any machine, from eager PyTorch in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hstu.artifact import Artifact
from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.signature import entry_names
from serving.engine import Array, check_feeds
from serving.engines.torch import open_torch_engine

NUM_CANDIDATES = 32


def write_golden(checkpoint: Artifact, folder: Path, *, num_histories: int) -> None:
    """Write `inputs.npz` and `outputs.npz` (arrays named `<entry>/<tensor>`) of held-out histories.

    The histories are the first `num_histories` of the checkpoint's evaluation split, cut to what the model takes.
    `extend` needs none: what it must answer to a returning user is what `retrieve` answers.
    """
    config = HSTUConfig.from_pretrained(checkpoint.path)
    evaluation = Histories.load(checkpoint.file("evaluation.npz"))
    rows = range(min(num_histories, len(evaluation)))
    histories = evaluation.select(list(rows)).newest(config.max_history)
    engine = open_torch_engine(checkpoint.path, threads=1)
    inputs: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    for entry in entry_names(config):
        if entry == "extend":
            continue
        feeds: dict[str, Array] = dict(histories.feeds(config))
        if entry == "rank":
            feeds["candidate_ids"] = spread_candidates(config, histories)
        check_feeds(config, entry, feeds)
        inputs |= {f"{entry}/{name}": value for name, value in feeds.items()}
        outputs |= {f"{entry}/{name}": value for name, value in engine.run(entry, feeds).items()}
    engine.close()
    folder.mkdir(parents=True)
    np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
    np.savez(folder / "outputs.npz", **outputs)  # type: ignore[arg-type]


def spread_candidates(config: HSTUConfig, histories: Histories) -> Array:
    """Candidates int64 [B, C] spread over the corpus, a different set a row, the row's target first where known."""
    spread = np.linspace(1, config.num_items, min(NUM_CANDIDATES, config.num_items)).astype(np.int64)
    shifts = np.arange(len(histories), dtype=np.int64)[:, None] * 7
    candidates: Array = (spread[None, :] - 1 + shifts) % config.num_items + 1
    known = histories.target_item > 0
    candidates[known, 0] = histories.target_item[known]
    return candidates
