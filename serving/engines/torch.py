"""The eager PyTorch model behind the engine interface: the reference, and the runtime that needs no build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from hstu.checkpoints.huggingface import load_pretrained
from hstu.config import HSTUConfig
from hstu.model import HSTU, history_from_feeds
from hstu.signature import EntryName
from hstu.signature import entry as entry_signature
from serving.engine import Array


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
        signature = entry_signature(self.config, entry)
        tensors = {name: torch.as_tensor(value) for name, value in feeds.items()}
        history = history_from_feeds(tensors)
        answers: tuple[torch.Tensor, ...]
        with torch.inference_mode():
            if entry == "rank":
                answers = (self.model.rank(history, tensors["candidate_ids"]),)
            elif entry == "extend":
                answers = self.model.extend(
                    history, tensors["cache"], tensors["cached_timestamps"], tensors["cached_lengths"]
                )
            else:
                answers = self.model.retrieve(history)
        return {spec.name: answer.numpy() for spec, answer in zip(signature.outputs, answers, strict=True)}

    def close(self) -> None:
        """Nothing is held that Python does not release."""


def open_torch_engine(folder: Path, *, threads: int | None = None) -> TorchEngine:
    """The model of a folder with `config.json` and `model.safetensors`, ready to run; InputError when it is not one."""
    return TorchEngine(load_pretrained(folder), threads=threads)
