"""The paged kernel alone: against plain loops in float64, over mixed steps, poisoned pages and odd sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.time_buckets import THRESHOLDS, time_buckets
from kernels.cpu.library import KernelError
from kernels.hstu_attention.naive import split
from kernels.paged_hstu_attention.cpu import LIBRARY, PagedCall, PagedLibrary, build, openmp_region
from kernels.paged_hstu_attention.naive import paged_attention

EDGES = np.array([0, *THRESHOLDS, 2**63 - 1], dtype=np.int64)
TORCH_OPENMP = next((Path(torch.__file__).parent / "lib").glob("libgomp*"))
STEPS = {
    "one row": [(0, 1)],
    "whole histories": [(0, 17), (0, 1), (0, 63), (0, 16), (0, 64), (0, 65)],
    "decodes": [(1, 1), (16, 1), (15, 1), (63, 1), (40, 1), (64, 1)],
    "mixed": [(0, 5), (20, 1), (16, 140), (0, 70), (33, 7), (179, 1), (0, 1), (31, 33)],
}
SHAPES = [(2, 3, 5), (1, 16, 16), (4, 32, 32), (3, 25, 40), (2, 64, 72)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> PagedLibrary:
    return PagedLibrary(build(tmp_path_factory.mktemp("paged")))


@dataclass(kw_only=True)
class Step:
    """Arrays of one step and what plain loops say about it."""

    call: PagedCall
    out: np.ndarray
    pages: np.ndarray
    expected: np.ndarray
    expected_pages: np.ndarray
    kept: list[Any]


def _step(requests: list[tuple[int, int]], shape: tuple[int, int, int], *, block: int = 16, seed: int = 0) -> Step:
    heads, dqk, dv = shape
    rng = np.random.default_rng(seed)
    max_length, width = 200, 2 * heads * (dqk + dv)
    position_bias = rng.standard_normal(2 * max_length - 1).astype(np.float32)
    time_bias = rng.standard_normal(129).astype(np.float32)
    pages_each = -(-max_length // block)
    num_pages = 1 + len(requests) * pages_each
    table = (1 + rng.permutation(num_pages - 1)).reshape(len(requests), pages_each).astype(np.int32)
    pages = np.full((num_pages, heads, block, dqk + dv), np.nan, dtype=np.float32)
    times = np.full(num_pages * block, -1, dtype=np.int64)
    rows, slots, next_times, expected, buckets_of = [], [], [], [], []
    expected_pages = pages.astype(np.float64)
    for request, (context, new) in enumerate(requests):
        uvqk = rng.standard_normal((context + new, width)).astype(np.float32)
        moments = np.sort(rng.integers(0, 10**9, size=context + new + 1))
        at = np.arange(context + new)
        places = table[request, at // block].astype(np.int64) * block + at % block
        times[places] = moments[:-1]
        _, v, _, k = split(uvqk[:context], heads, dv)
        for t in range(context):
            pages[table[request, t // block], :, t % block] = np.concatenate([k[t], v[t]], axis=-1)
        buckets = time_buckets(torch.from_numpy(moments[1 + context :, None] - moments[None, :-1])).numpy()
        expected_pages[table[request]] = pages[table[request]]
        expected.append(
            paged_attention(uvqk[context:].astype(np.float64), expected_pages, table[request], context, buckets,
                            position_bias.astype(np.float64), time_bias.astype(np.float64), v_dim=dv)
        )  # fmt: skip
        rows.append(uvqk[context:])
        slots.append(places[context:])
        next_times.append(moments[1 + context :])
        buckets_of.append(new * (context + new))
    uvqk, num_new = np.concatenate(rows), np.array([n for _, n in requests], dtype=np.int64)
    arrays = {
        "uvqk": uvqk,
        "pages": pages,
        "slots": np.concatenate(slots),
        "first": np.cumsum(num_new) - num_new,
        "num_new": num_new,
        "context": np.array([c for c, _ in requests], dtype=np.int64),
        "table": table,
        "position_bias": position_bias,
        "time_bias": time_bias,
        "buckets": np.zeros(sum(buckets_of), dtype=np.uint8),
        "bucket_start": np.cumsum(buckets_of) - np.array(buckets_of, dtype=np.int64),
        "times": times,
        "next_times": np.concatenate(next_times),
        "edges": EDGES,
        "out": np.full((len(uvqk), heads * dv), np.nan, dtype=np.float32),
    }
    call = PagedCall(
        rows=len(uvqk), requests=len(requests), heads=heads, qk_dim=dqk, v_dim=dv, max_length=max_length, block=block,
        row_stride=width, table_stride=pages_each, epsilon=1e-6, gated=1, threads=1,
        **{name: array.ctypes.data for name, array in arrays.items()},
    )  # fmt: skip
    return Step(
        call=call,
        out=arrays["out"],
        pages=pages,
        expected=np.concatenate(expected),
        expected_pages=expected_pages,
        kept=list(arrays.values()),
    )


def _run(library: PagedLibrary, step: Step) -> None:
    library.buckets(ctypes.byref(step.call))
    library.attention(ctypes.byref(step.call))


@pytest.fixture(params=["avx2", "avx512"])
def isa(request: pytest.FixtureRequest, library: PagedLibrary) -> Iterator[str]:
    widest = library.isa
    if request.param == "avx512" and widest == "avx2":
        pytest.skip("this CPU has no AVX-512")
    library.limit_isa(request.param)
    yield request.param
    library.limit_isa(widest)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_equals_plain_loops(library: PagedLibrary, isa: str, name: str, shape: tuple[int, int, int]) -> None:
    step = _step(STEPS[name], shape, seed=len(name))
    _run(library, step)
    np.testing.assert_allclose(step.out, step.expected, rtol=0, atol=1e-5 * max(1, np.abs(step.expected).max()))
    np.testing.assert_allclose(step.pages, step.expected_pages, rtol=0, atol=1e-6)  # NaN where nothing was written


def test_other_page_sizes(library: PagedLibrary) -> None:
    for block in (32, 64, 128):
        step = _step(STEPS["mixed"], (2, 8, 8), block=block)
        _run(library, step)
        np.testing.assert_allclose(step.out, step.expected, rtol=0, atol=2e-5)


def test_threads_and_chunks_do_not_move_a_bit(library: PagedLibrary) -> None:
    alone, threaded = _step(STEPS["mixed"], (4, 32, 32)), _step(STEPS["mixed"], (4, 32, 32))
    _run(library, alone)
    threaded.call.threads, threaded.call.parallel = 4, openmp_region(TORCH_OPENMP)
    _run(library, threaded)
    np.testing.assert_array_equal(alone.out, threaded.out)
    whole, again = _step([(0, 100)], (2, 16, 16)), _step([(0, 100)], (2, 16, 16))
    _run(library, whole)
    rows = np.arange(100)
    start, places = 0, np.zeros(2, dtype=np.int64)  # context and new rows of one chunk
    uvqk, slots, times = again.call.uvqk, again.call.slots, again.call.next_times
    out = again.call.out
    for size in (1, 15, 17, 50, 17):
        places[:] = start, size
        first, zero = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        again.call.rows, again.call.uvqk = size, uvqk + start * again.call.row_stride * 4
        again.call.slots, again.call.next_times, again.call.out = (
            slots + start * 8,
            times + start * 8,
            out + start * 32 * 4,
        )
        again.call.context, again.call.num_new = places.ctypes.data, places.ctypes.data + 8
        again.call.first, again.call.bucket_start = first.ctypes.data, zero.ctypes.data
        _run(library, again)
        start += size
    assert start == len(rows)
    np.testing.assert_array_equal(whole.out, again.out)


def test_bf16_pages(library: PagedLibrary) -> None:
    """Rows and pages in bf16, sums in float32: as close as bf16 rows allow."""
    step = _step(STEPS["mixed"], (2, 32, 32))
    heads, dv = 2, 32
    as_bf16 = {
        name: torch.from_numpy(array).bfloat16() for name, array in zip(("uvqk", "pages"), step.kept[:2], strict=True)
    }
    out = torch.zeros(step.call.rows, heads * dv, dtype=torch.bfloat16)
    step.call.uvqk, step.call.pages = as_bf16["uvqk"].data_ptr(), as_bf16["pages"].data_ptr()
    step.call.out, step.call.bfloat16 = out.data_ptr(), 1
    _run(library, step)
    error = np.abs(out.float().numpy() - step.expected)
    assert error.max() < 0.03 * np.abs(step.expected).max()
    assert error.mean() < 0.005


def test_attended_values_without_the_gate(library: PagedLibrary) -> None:
    step = _step([(0, 40)], (1, 8, 8))
    step.call.gated = 0
    _run(library, step)
    u, *_ = split(step.kept[0].astype(np.float64), 1, 8)
    centred = step.out - step.out.mean(-1, keepdims=True)
    gated = u * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(gated, step.expected, rtol=0, atol=1e-4)


def test_what_cannot_be_built_or_loaded_is_said(tmp_path: Path, library: PagedLibrary) -> None:
    with pytest.raises(KernelError, match="install a C\\+\\+20 compiler"):
        build(tmp_path, compiler="no-such-compiler")
    (tmp_path / LIBRARY).write_bytes(b"no library")
    with pytest.raises(KernelError, match="cannot be loaded"):
        PagedLibrary(tmp_path / LIBRARY)
    with pytest.raises(KernelError, match="no OpenMP"):
        openmp_region(tmp_path / "libgomp.so")
    with pytest.raises(KernelError, match="has no mmx"):
        library.limit_isa("mmx")
