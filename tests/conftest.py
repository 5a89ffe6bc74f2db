"""Fixtures for every test."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from kernels.cpu.cache import user_cache
from kernels.cpu.library import build

ORACLE = Path(__file__).parents[2] / "shared" / "oracle" / "ml-1m"


@pytest.fixture
def oracle() -> Path:
    """The folder with a file in Meta's format and Meta's own answers; the test is skipped where it is not."""
    if not ORACLE.is_dir():
        pytest.skip("no oracle: Meta's own answers stand in ../shared/oracle, which this machine does not have")
    return ORACLE


@pytest.fixture(scope="session")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU kernels, compiled when their sources have changed."""
    return build(tmp_path_factory.mktemp("kernels"), cache=user_cache())


def pytest_configure() -> None:
    """A run in the background or under nohup ignores signals, and so would every child that tests interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
