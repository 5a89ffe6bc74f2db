"""Sessions over the tiny bundle, without the peers that take long to start."""

from __future__ import annotations

from pathlib import Path

from stages.measure.case_models import bundle_files
from stages.measure.contestants import contestants
from stages.measure.session import Session
from tests.models import tiny_config
from tests.stages.measure.requests import CASE, EFFORT

SLOW_PEERS = ("vllm", "torch-compile", "openvino-plain")


def session(artifacts: Path, *, without: tuple[str, ...] = SLOW_PEERS) -> Session:
    runtimes = contestants(bundle_files(artifacts / "bundle"))
    return Session(
        case=CASE,
        config=TINY_BUNDLE,
        contestants=[c for c in runtimes if c.runtime not in without],
        effort=EFFORT,
        seed=0,
        on_cell=lambda _found: None,
    )


TINY_BUNDLE = tiny_config(num_layers=1, tasks=(), head_dim=0)
