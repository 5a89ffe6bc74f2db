"""One vLLM engine of each kind and one bundle to serve for the whole session: a start costs seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hstu.checkpoints.huggingface import save_pretrained
from hstu.data.histories import Histories
from hstu.model import HSTU
from kernels.paged_hstu_attention.cpu import build
from serving.bundle import Bundle
from serving.vllm_plugin.tokenizer import write_tokenizer
from tests.models import random_model, tiny_config
from tests.serving.services import write_bundle

if TYPE_CHECKING:
    from serving.vllm_plugin.runtime import VllmRuntime

VLLM_CONFIG = tiny_config(max_history=90)  # up to 7 pages a request


def write_model_folder(path: Path, model: HSTU) -> Path:
    """What vLLM loads: weights, config, tokenizer; without a kernel."""
    path.mkdir(exist_ok=True)
    save_pretrained(model, path)
    write_tokenizer(path, model.config)
    return path


def float_prompts(runtime: VllmRuntime, histories: Histories) -> list[dict[str, Any]]:
    """Prompts as a caller of vLLM's own `generate` and `encode` gives them."""
    from serving.vllm_plugin.records import records_from_histories

    return [{"prompt_embeds": rows.float()} for rows in records_from_histories(histories, runtime.config)]


@pytest.fixture(scope="session")
def vllm_model() -> HSTU:
    return random_model(VLLM_CONFIG)


@pytest.fixture(scope="session")
def vllm_folder(vllm_model: HSTU, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder as a bundle has it, the kernel with it."""
    folder = write_model_folder(tmp_path_factory.mktemp("vllm-model"), vllm_model)
    (folder / "runtime").mkdir()
    build(folder / "runtime")
    return folder


@pytest.fixture(scope="session")
def runtime(vllm_folder: Path) -> Iterator[VllmRuntime]:
    """The bundle's kernel attends."""
    from serving.vllm_plugin.runtime import VllmRuntime

    runtime = VllmRuntime(vllm_folder, kv_cache_mib=64, additional_config={"hstu_attention": "kernel"})
    yield runtime
    runtime.close()


@pytest.fixture(scope="session")
def cramped(vllm_folder: Path) -> Iterator[VllmRuntime]:
    """PyTorch attends, over few pages in small steps: long prompts come in chunks, requests are thrown out and back."""
    from serving.vllm_plugin.runtime import VllmRuntime

    runtime = VllmRuntime(
        vllm_folder, kv_cache_mib=64, max_batch=8, max_num_batched_tokens=24, num_gpu_blocks_override=14,
        additional_config={"hstu_attention": "torch"},
    )  # fmt: skip
    yield runtime
    runtime.close()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that ranks, for the service."""
    return write_bundle(tmp_path_factory.mktemp("service"))
