"""The eager PyTorch model behind the engine interface: the reference, and the runtime that needs no build."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hstu.config import HSTUConfig
from hstu.errors import ArtifactError, InputError
from hstu.model import HSTU, history_from_feeds
from hstu.signature import EntryName, entry_names
from serving.engine import Array

WEIGHTS = "model.safetensors"


class TorchEngine:
    """Runs `hstu.model` in fp32 on the CPU, with the inputs and outputs of `hstu.signature`."""

    backend = "torch"
    precision = "fp32"

    def __init__(self, model: HSTU, *, threads: int | None = None) -> None:
        """`threads` sets PyTorch's pool, which is one for the whole process; None leaves it as it is."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = model.eval()
        self.config: HSTUConfig = model.config

    def run(self, entry: EntryName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The entry's outputs by name. Feeds must have passed `check_feeds`."""
        if entry not in entry_names(self.config):
            raise InputError(f"this model has no {entry!r} entry", expected=", ".join(entry_names(self.config)))
        tensors = {name: torch.as_tensor(value) for name, value in feeds.items()}
        history = history_from_feeds(tensors)
        with torch.inference_mode():
            if entry == "rank":
                return {"task_scores": self.model.rank(history, tensors["candidate_ids"]).numpy()}
            embedding, item_ids, scores = self.model.retrieve(history)
        return {"user_embedding": embedding.numpy(), "top_item_ids": item_ids.numpy(), "top_scores": scores.numpy()}

    def close(self) -> None:
        """Nothing is held that Python does not release."""


def open_checkpoint(folder: Path, *, threads: int | None = None) -> TorchEngine:
    """The model of a folder with `config.json` and `model.safetensors`, ready to run.

    Raises InputError when config.json is not an HSTU config, ArtifactError when the weights do not fit it.
    """
    config = HSTUConfig.from_pretrained(folder)
    path = folder / WEIGHTS
    fix = "run the checkpoint stage again"
    try:
        weights = load_file(path)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error})", fix=fix) from None
    model = HSTU(config)
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    got = {name: list(value.shape) for name, value in weights.items()}
    if got != expected:
        raise ArtifactError(
            f"{path}: these weights are not of the model that config.json describes",
            got={name: shape for name, shape in got.items() if expected.get(name) != shape},
            expected={name: shape for name, shape in expected.items() if got.get(name) != shape},
            fix=fix,
        )
    model.load_state_dict(weights)
    return TorchEngine(model, threads=threads)
