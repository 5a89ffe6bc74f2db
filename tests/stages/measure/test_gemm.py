"""The roof: the fastest matrix products."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from stages.measure.cases import find_case
from stages.measure.gemm import LARGE, LIBRARIES, Roof
from tests.models import TINY


def test_the_roof_is_the_fastest_product_of_every_precision() -> None:
    config = dataclasses.replace(TINY, embedding_dim=64)
    roof = Roof(config, threads=1)
    assert set(roof.gflops()) == {"fp32", "bf16", "int8"}
    for precision, product in roof.best.items():
        assert product.library in LIBRARIES[precision]
        shapes = {(64, TINY.uvqk_dim), (TINY.num_heads * TINY.v_dim, 64), LARGE[1:]}
        assert (product.inner, product.columns) in shapes
    # Beyond what one core can do: 512-bit units, two multiply-adds a clock, 8 GHz, int8 four times that.
    assert 1 < roof.gflops()["fp32"] < 1024
    assert 1 < roof.gflops()["int8"] < 4096


def test_every_library_multiplies_in_every_precision_that_it_is_asked_for() -> None:
    for libraries in LIBRARIES.values():
        for make in libraries.values():
            make(3, 16, 32, 1)()


@pytest.mark.slow
def test_no_product_of_the_roof_exceeds_it(tmp_path: Path) -> None:
    """An "engine" that is nothing but the products themselves has a share of about 100 %, and never much more."""
    roof = Roof(find_case("small").config, threads=1)  # type: ignore[arg-type]
    for precision, product in roof.best.items():
        rates, own = [], []
        for _ in range(7):
            rates.append(roof.gflops()[precision])
            own.append(product.gflops(1))
        assert float(np.median(own)) / float(np.median(rates)) < 1.1
