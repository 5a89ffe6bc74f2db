"""The schedule of the CUTLASS attention kernel, run on this machine with the kernel's own header, against the truth."""

from __future__ import annotations

import ctypes
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.hstu_attention import naive

ROOT = Path(__file__).parents[2]
WIDTH, HEADS = 32, 2


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel's schedule, compiled with the host's compiler."""
    path = tmp_path_factory.mktemp("schedule") / "schedule.so"
    command = ["g++", "-std=c++17", "-O3", "-march=native", "-Wall", "-Wextra"]
    command += ["-Werror", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'kernels' / 'hstu_attention'}", "-o", str(path)]
    subprocess.run([*command, str(Path(__file__).parent / "attention_host.cpp")], check=True)
    library = ctypes.CDLL(str(path))
    library.attend.restype = ctypes.c_char_p
    return library


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def attend(
    host: ctypes.CDLL, lengths: list[int], targets: list[int], *, groups: int = 2, columns: int = 128, stages: int = 3,
    together: int = 3, grid: int = 3, seed: int = 0, poisoned_user: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """What the schedule makes of random users, what is true, and the offsets."""
    g, rows = np.random.default_rng(seed), sum(lengths)
    q, k, v = (g.standard_normal((rows, HEADS, WIDTH)) for _ in range(3))
    offsets = np.array([0, *np.cumsum(lengths)], dtype=np.int64)
    if poisoned_user is not None:
        for x in (q, k, v):
            x[offsets[poisoned_user] : offsets[poisoned_user + 1]] = np.nan
    num_targets, out = np.array(targets, dtype=np.int64), np.full((rows, HEADS, WIDTH), np.inf)
    longest = max(lengths)
    said = host.attend(
        *(pointer(x) for x in (q, k, v, out, offsets, num_targets)), rows, HEADS, len(lengths), longest, WIDTH, groups,
        columns, stages, together, grid, ctypes.c_double(1 / longest), seed,
    )  # fmt: skip
    assert said == b"", said.decode()
    users = [slice(a, b) for a, b in pairwise(offsets)]
    parts = [
        naive.attend(q[u], k[u], v[u], 0.0, max_length=longest, num_targets=t)
        for u, t in zip(users, targets, strict=True)
    ]
    return out, np.concatenate(parts), offsets


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize(
    ("lengths", "targets"),
    [
        ([0, 1, 63, 64, 65], [0, 1, 10, 64, 0]),
        ([127, 128, 129, 0], [0, 128, 1, 0]),
        ([191, 192, 193], [60, 0, 193]),
        ([511, 300], [100, 300]),
        ([257, 511], [0, 0]),
        ([400], [256]),
    ],
)
def test_the_schedule_computes_attention(
    host: ctypes.CDLL, lengths: list[int], targets: list[int], groups: int
) -> None:
    out, truth, _ = attend(host, lengths, targets, groups=groups)
    assert np.abs(out - truth).max(initial=0) < 1e-9


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_threads_at_any_speed_compute_the_same(host: ctypes.CDLL, stages: int, seed: int) -> None:
    out, truth, _ = attend(host, [200, 1, 0, 140], [20, 0, 0, 140], stages=stages, grid=1, seed=seed)
    assert np.abs(out - truth).max() < 1e-9


@pytest.mark.parametrize(("length", "targets"), [(70, 0), (200, 150)])  # the last tile is the first one, or a later
def test_one_user_s_nan_is_no_other_s(host: ctypes.CDLL, length: int, targets: int) -> None:
    out, truth, offsets = attend(host, [length, 40, 129], [targets, 0, 30], poisoned_user=1)
    clean = np.r_[: offsets[1], offsets[2] : offsets[3]]
    assert np.abs(out[clean] - truth[clean]).max() < 1e-9
    assert np.isnan(out[offsets[1] : offsets[2]]).all()


@pytest.mark.parametrize(
    ("heads", "users", "blocks", "together"), [(8, 5, 7, 6), (1, 1, 1, 1), (3, 7, 4, 21), (2, 3, 5, 4)]
)
def test_every_block_of_rows_is_worked_on_once(
    host: ctypes.CDLL, heads: int, users: int, blocks: int, together: int
) -> None:
    place = (ctypes.c_int * 3)()
    places = []
    for item in range(heads * users * blocks):
        host.locate(heads, users, blocks, together, ctypes.c_int64(item), place)
        places.append(tuple(place))
    assert sorted(places) == [(b, h, u) for b in range(blocks) for h in range(heads) for u in range(users)]
    first = [block for block, _, _ in places[: min(together, heads * users) * blocks]]
    assert first == sorted(first, reverse=True), "the longest blocks of a group come first"


@pytest.mark.parametrize("rows", [128, 192])
@pytest.mark.parametrize("columns", [64, 128])
def test_tiles_hold_each_seen_pair_once_and_none_in_vain(host: ctypes.CDLL, rows: int, columns: int) -> None:
    starts, masked = (ctypes.c_int * 99)(), ctypes.c_int()
    for length in (1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300, 511):
        for targets in {0, 1, length // 3, length - 1, length}:
            seen = np.zeros((length + rows, length + columns), dtype=int)
            seen[:length, :length] = naive.visible(length, targets)
            for first in range(0, length, rows):
                count = host.tiles(first, rows, columns, length, length - targets, starts, ctypes.byref(masked))
                block, covered = seen[first : first + rows], np.zeros(seen.shape[1], dtype=int)
                for step, start in enumerate(starts[:count]):
                    tile = block[: length - first, start : start + columns]
                    assert tile.any(), "a tile that no row sees"
                    assert step < masked.value or tile.all(), "a tile without a mask that some row does not see"
                    covered[start : start + columns] += 1
                assert masked.value >= 1
                assert covered.max() == 1
                assert (block.sum(0)[covered == 0] == 0).all(), "a seen pair is in no tile"


def test_four_threads_trade_words(host: ctypes.CDLL) -> None:
    words = np.arange(16, dtype=np.uint32).reshape(4, 4)
    traded: Any = words.copy()
    host.trade(pointer(traded))
    assert (traded == words.T).all()
