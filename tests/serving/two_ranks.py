"""Answers of an engine of two tensor-parallel processes, for a test: `python -m tests.serving.two_ranks MODEL FOLDER`.

A process of its own, since vLLM reads how threads are bound once in a process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hstu.data.histories import Histories
from hstu.errors import InputError
from serving.slate import Slate
from serving.vllm_plugin.runtime import VllmRuntime


def main() -> None:
    model, folder = map(Path, sys.argv[1:])
    histories = Histories.load(folder / "histories.npz")
    runtime = VllmRuntime(model, kv_cache_mib=64, tensor_parallel_size=2)
    embeddings = runtime.embed(histories)
    with pytest.raises(InputError, match="one tensor-parallel rank"):
        runtime.slates(histories, Slate(num_items=3, method="beam"))
    ids, scores = runtime.greedy_slates(histories, 10)
    np.savez(folder / "answers.npz", embeddings=embeddings, ids=ids, scores=scores)
    runtime.close()


if __name__ == "__main__":
    main()
