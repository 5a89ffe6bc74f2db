"""The CUTLASS interaction kernel's order and places, run on this machine with its own header, against the truth."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kernels.interaction import naive
from kernels.interaction.variants import num_pairs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel's order and places, compiled with the host's compiler."""
    path = tmp_path_factory.mktemp("samples") / "samples.so"
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{ROOT / 'kernels' / 'interaction'}", "-o", str(path)]
    subprocess.run([*command, str(Path(__file__).parent / "interaction_host.cpp")], check=True)
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("with_self", [False, True])
@pytest.mark.parametrize(("samples", "features", "warps"), [(1, 27, 1), (7, 27, 2), (5, 32, 1), (9, 2, 4), (3, 17, 5)])
def test_samples_are_multiplied_and_packed(
    host: ctypes.CDLL, samples: int, features: int, warps: int, with_self: bool
) -> None:
    x = np.random.default_rng(features).standard_normal((samples, features, 128))
    out = np.full((samples, num_pairs(features, with_self)), np.inf)
    places = [ctypes.c_void_p(array.ctypes.data) for array in (x, out)]
    assert host.interact(*places, ctypes.c_int64(samples), features, int(with_self), warps) == 0
    assert np.abs(out - naive.interaction(x, with_self=with_self)).max() < 1e-10
