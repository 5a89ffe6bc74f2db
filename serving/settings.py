"""How a bundle is served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu.errors import UsageError
from hstu.signature import CacheForm


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSettings:
    """How a bundle is served."""

    engine: str | None = None  # None: the bundle's choice
    state_form: CacheForm = "fp32"
    vllm: bool = False  # whether the process that generates slates is started
    vllm_options: dict[str, Any] = field(default_factory=dict)  # of vllm.LLM, such as tensor_parallel_size
    ranker: bool = True  # whether the process that ranks is started
    strict: bool = False  # no fallback at any level
    deadline_ms: int = 1000  # of requests that give none
    max_batch: int = 32
    batch_wait_ms: float = 2.0
    max_queue: int = 256
    cache_mib: int = 256
    device_share: float = 0.5
    disk: Path | None = None
    disk_mib: int = 0
    max_users: int = 100_000
    threads: int | None = None


def vllm_options(given: Sequence[str]) -> dict[str, Any]:
    """Options of `vllm.LLM` from NAME=VALUE, values as JSON or else text; UsageError for anything else."""
    options: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError("not an option of vLLM", got=one, expected="NAME=VALUE, such as tensor_parallel_size=2")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
