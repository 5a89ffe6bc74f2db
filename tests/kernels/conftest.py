"""The CPU kernels, compiled once a session, on every instruction set this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels.cpu.library import Isa, Library
from kernels.cpu.load import load

ISAS: tuple[Isa, ...] = ("avx2", "avx512", "avx512_bf16")


@pytest.fixture(scope="session")
def library(library_file: Path) -> Library:
    return load(library_file)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, library: Library) -> Iterator[str]:
    """The test runs once with each set at most; the widest is in use again afterwards."""
    widest: Isa = library.isa  # type: ignore[assignment]
    if ISAS.index(request.param) > ISAS.index(widest):
        pytest.skip(f"this CPU has only {widest}")
    library.limit_isa(request.param)
    yield request.param
    library.limit_isa(widest)
