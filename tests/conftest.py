"""Fixtures for every test."""

from __future__ import annotations

from pathlib import Path

import pytest

ORACLE = Path(__file__).parents[2] / "shared" / "oracle" / "ml-1m"


@pytest.fixture
def oracle() -> Path:
    """The folder with a file in Meta's format and Meta's own answers; the test is skipped where it is not."""
    if not ORACLE.is_dir():
        pytest.skip("no oracle: Meta's own answers stand in ../shared/oracle, which this machine does not have")
    return ORACLE
