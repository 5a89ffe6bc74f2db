"""The fused CPU kernel against the naive truth in float64, on every instruction set this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from hstu.config import HSTUConfig
from hstu.model import HSTUAttention
from hstu.time_buckets import THRESHOLDS, time_buckets
from kernels.cpu.library import LIBRARY, OPERATIONS, KernelError, Library, build, openvino_folder
from kernels.cpu.load import load
from kernels.hstu_attention import cpu, naive

Array = npt.NDArray[Any]
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 200, 511)
SHAPES = ((1, 50, 50), (2, 25, 25), (4, 64, 64), (16, 8, 8), (3, 128, 33), (2, 9, 100))  # heads, qk_dim, v_dim
FP32_TOLERANCE = 1e-5  # absolute, and of a row's largest value where that is above 1
BF16_TOLERANCE = 1e-2  # of the norm of a user's output


class Problem:
    """A random batch of histories in one layer, with poison wherever no answer may look."""

    def __init__(self, heads: int, qk_dim: int, v_dim: int, lengths: tuple[int, ...], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = np.array(lengths, dtype=np.int64)
        self.rows = max(1, *lengths)
        self.width, self.out_width = 2 * heads * (qk_dim + v_dim), heads * v_dim
        self.shape = cpu.Shape(
            heads=heads,
            qk_dim=qk_dim,
            v_dim=v_dim,
            max_length=self.rows + 5,
            position_bias=rng.standard_normal(2 * self.rows + 9).astype(np.float32),
            time_bias=rng.standard_normal(129).astype(np.float32),
        )
        self.uvqk = 0.8 * rng.standard_normal((len(lengths), self.rows, self.width), dtype=np.float32)
        self.buckets = rng.integers(0, 129, (len(lengths), self.rows, self.rows))
        for b, n in enumerate(lengths):
            self.uvqk[b, n:] = np.nan
            self.buckets[b, n:], self.buckets[b, :, n:] = -(2**40), 2**40

    def tables(self) -> tuple[Array, Array]:
        return self.shape.position_bias.astype(np.float64), self.shape.time_bias.astype(np.float64)

    def truth(self, b: int, uvqk: Array | None = None) -> Array:
        n, heads = int(self.lengths[b]), self.shape.heads
        rows = (self.uvqk if uvqk is None else uvqk)[b, :n].astype(np.float64)
        return naive.attention(rows, self.buckets[b, :n, :n], *self.tables(), heads=heads, v_dim=self.shape.v_dim)

    def poisoned(self, dtype: npt.DTypeLike = np.float32) -> Array:
        return np.full((len(self.lengths), self.rows, self.out_width), np.nan if dtype == np.float32 else 0x7FC0, dtype)


def assert_equal(answer: Array, truth: Array) -> None:
    scale = np.abs(truth).max(axis=-1, keepdims=True, initial=1)
    assert (np.abs(answer - truth) / scale).max(initial=0) <= FP32_TOLERANCE


def bf16_from_float(x: Array) -> Array:
    return torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()


def float_from_bf16(x: Array) -> Array:
    return torch.from_numpy(x).view(torch.bfloat16).float().numpy()


@pytest.mark.parametrize(("heads", "qk_dim", "v_dim"), SHAPES)
def test_fp32_equals_the_truth(library: Library, isa: str, heads: int, qk_dim: int, v_dim: int) -> None:
    problem = Problem(heads, qk_dim, v_dim, LENGTHS if heads == 1 else LENGTHS[:-1])
    out = problem.poisoned()
    cpu.Attention(library, problem.shape).attention(problem.uvqk, problem.buckets, problem.lengths, out=out)
    for b, n in enumerate(problem.lengths):
        assert_equal(out[b, :n], problem.truth(b))
        assert not out[b, n:].any()


@pytest.mark.parametrize(("heads", "qk_dim", "v_dim"), SHAPES)
@pytest.mark.parametrize("io", ["float32", "bfloat16"])
def test_bf16_is_near_the_truth(library: Library, isa: str, heads: int, qk_dim: int, v_dim: int, io: str) -> None:
    problem = Problem(heads, qk_dim, v_dim, LENGTHS[:-1], seed=1)
    uvqk = bf16_from_float(problem.uvqk) if io == "bfloat16" else problem.uvqk
    shape = cpu.Shape(**{n: getattr(problem.shape, n) for n in problem.shape.__slots__} | {"bf16": True})
    out = problem.poisoned(uvqk.dtype)
    cpu.Attention(library, shape).attention(uvqk, problem.buckets, problem.lengths, out=out)
    answer = float_from_bf16(out) if io == "bfloat16" else out
    for b, n in enumerate(problem.lengths):
        truth = problem.truth(b, float_from_bf16(uvqk) if io == "bfloat16" else None)
        assert np.linalg.norm(answer[b, :n] - truth) <= BF16_TOLERANCE * np.linalg.norm(truth)
        assert not answer[b, n:].any()


def test_bf16_rounding_is_the_same_on_every_instruction_set(library: Library, isa: str) -> None:
    problem = Problem(2, 25, 25, (40,))
    uvqk, out, wide = bf16_from_float(problem.uvqk), problem.poisoned(np.uint16), problem.poisoned()
    cpu.Attention(library, problem.shape).attention(uvqk, problem.buckets, problem.lengths, out=out)
    cpu.Attention(library, problem.shape).attention(float_from_bf16(uvqk), problem.buckets, problem.lengths, out=wide)
    assert np.array_equal(out, bf16_from_float(wide))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_every_bucket_type_gives_the_same_answer(library: Library, isa: str, dtype: npt.DTypeLike) -> None:
    problem = Problem(2, 16, 16, (70, 33))
    inside = np.where(np.abs(problem.buckets) < 200, problem.buckets, 0)
    outs = []
    for buckets in (inside, inside.astype(dtype)):
        outs.append(problem.poisoned())
        cpu.Attention(library, problem.shape).attention(problem.uvqk, buckets, problem.lengths, out=outs[-1])
    assert np.array_equal(*outs)


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 65, 130])
def test_extending_a_cached_history_equals_computing_it_whole(library: Library, isa: str, prefix: int) -> None:
    heads, d, new, room = 4, 24, 70, prefix + 9
    problem = Problem(heads, d, d, (prefix + new, prefix + 3))
    whole = problem.poisoned()
    cpu.Attention(library, problem.shape).attention(problem.uvqk, problem.buckets, problem.lengths, out=whole)
    _, v, _, k = np.split(problem.uvqk, 4, axis=2)
    cache = np.full((2, 3, room, 2 * heads * d), np.nan, np.float32)[:, 1]  # the middle one of three layers
    cache[:, :prefix] = naive.silu(np.concatenate([k, v], axis=2)[:, :prefix].astype(np.float64))
    buckets = np.full((2, new, room + new), -(2**40))
    buckets[:, :, :prefix] = problem.buckets[:, prefix:, :prefix]
    buckets[:, :, room:] = problem.buckets[:, prefix:, prefix:]
    out = np.full((2, new, heads * d), np.nan, np.float32)
    cpu.Attention(library, problem.shape).attention(
        np.ascontiguousarray(problem.uvqk[:, prefix:]),
        buckets,
        problem.lengths - prefix,
        out=out,
        cache=(cache, np.array([prefix, prefix], dtype=np.int64)),
    )
    for b, n in enumerate(problem.lengths):
        assert_equal(out[b, : n - prefix], whole[b, prefix:n])


@pytest.mark.parametrize("count", [1, 5, 60])
def test_single_queries_equal_rows_of_the_whole(library: Library, isa: str, count: int) -> None:
    heads, qk_dim, v_dim = 3, 20, 36
    problem = Problem(heads, qk_dim, v_dim, (130, 65, 1, 0))
    whole, rng = problem.poisoned(), np.random.default_rng(2)
    cpu.Attention(library, problem.shape).attention(problem.uvqk, problem.buckets, problem.lengths, out=whole)
    positions = np.stack([rng.integers(-1, n, count) for n in problem.lengths])
    positions[:, -1] = problem.lengths - 1
    users = np.arange(len(positions))[:, None]
    hv, hqk = heads * v_dim, heads * qk_dim
    u, v, q, k = np.split(problem.uvqk, [hv, 2 * hv, 2 * hv + hqk], axis=2)
    uq = np.concatenate([u, q], axis=2)[users, positions.clip(min=0)]
    out = np.full((len(positions), count, hv), np.nan, np.float32)
    kv = np.concatenate([k, v], axis=2)
    buckets = problem.buckets[users, positions.clip(min=0)]
    cpu.Attention(library, problem.shape).queries(np.nan_to_num(uq), kv, buckets, positions, out=out)
    expected = np.where(positions[..., None] >= 0, whole[users, positions.clip(min=0)], 0)
    assert_equal(out, expected)


@pytest.mark.parametrize("columns", ["whole", "k and v"])
@pytest.mark.parametrize("count", [1, 7, 130])
@pytest.mark.parametrize("shared", [True, False])
def test_candidates_equal_the_truth(library: Library, isa: str, columns: str, count: int, shared: bool) -> None:
    heads, qk_dim, v_dim, rng = 3, 20, 36, np.random.default_rng(3)
    problem = Problem(heads, qk_dim, v_dim, (100, 64, 1, 0))
    users = len(problem.lengths)
    uvqk = rng.standard_normal((users, count, problem.width)).astype(np.float32)
    standing = 1 if shared else count
    positions = np.stack([rng.integers(0, n + 1, standing) for n in problem.lengths])
    if shared:
        positions[:] = problem.lengths[:, None]
    buckets = rng.integers(0, 129, (users, standing, problem.rows)).astype(np.uint8)
    own = None if shared else rng.integers(0, 129, (users, standing)).astype(np.uint8)
    hv, hqk = heads * v_dim, heads * qk_dim
    history, offsets = problem.uvqk, {"v_offset": hv, "k_offset": 2 * hv + hqk}
    if columns == "k and v":
        history, offsets = np.concatenate([history[..., -hqk:], history[..., hv : 2 * hv]], axis=2), {}
        offsets = {"v_offset": hqk, "k_offset": 0}
    out = np.full((users, count, hv), np.nan, np.float32)
    cpu.Attention(library, problem.shape).candidates(
        history, uvqk, buckets, positions, out=out, own_buckets=own, **offsets
    )
    for b in range(users):
        truth = naive.candidates(
            problem.uvqk[b].astype(np.float64),
            uvqk[b].astype(np.float64),
            np.broadcast_to(buckets[b], (count, problem.rows)),
            np.broadcast_to(0 if own is None else own[b], count),
            np.broadcast_to(positions[b], count),
            *problem.tables(),
            heads=heads,
            v_dim=v_dim,
        )
        assert_equal(out[b], truth)


JAGGED = (0, 1, 63, 0, 64, 65, 2)


def jagged(padded: Array, lengths: Array, gap: int) -> tuple[Array, Array]:
    """Rows [1, T, ·] of all users and where each user's start; poison stands in `gap` rows after each user."""
    rows, starts = [], [0]
    for b, n in enumerate(lengths):
        rows += [padded[b, :n], np.full((gap, padded.shape[2]), np.nan, np.float32)]
        starts.append(starts[-1] + int(n) + gap)
    return np.concatenate(rows)[None], np.array(starts, dtype=np.int64)


@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("io", ["float32", "int8"])
def test_rows_without_padding_equal_padded_ones(library: Library, isa: str, gap: int, io: str) -> None:
    """A row's answer is the same bits; what stands after a user's rows becomes zero."""
    problem = Problem(3, 20, 36, JAGGED)
    attention = cpu.Attention(library, problem.shape)
    rows, starts = jagged(problem.uvqk, problem.lengths, gap)
    whole, out = problem.poisoned(), np.full((1, rows.shape[1], problem.out_width), np.nan, np.float32)
    scales = None
    if io == "int8":
        whole, out = np.full(whole.shape, 99, np.int8), np.full(out.shape, 99, np.int8)
        scales = np.full(out.shape[:2], np.nan, np.float32)
    padded_scales = None if scales is None else np.full(whole.shape[:2], np.nan, np.float32)
    attention.attention(problem.uvqk, problem.buckets, problem.lengths, out=whole, out_scales=padded_scales)
    attention.attention(rows, problem.buckets, problem.lengths, out=out, out_scales=scales, starts=starts)
    for b, n in enumerate(problem.lengths):
        assert np.array_equal(out[0, starts[b] : starts[b] + n], whole[b, :n])
        assert not out[0, starts[b] + n : starts[b + 1]].any()
        if scales is not None and padded_scales is not None:
            assert np.array_equal(scales[0, starts[b] : starts[b] + n], padded_scales[b, :n])
        else:
            assert_equal(out[0, starts[b] : starts[b] + n], problem.truth(b))


@pytest.mark.parametrize("mode", ["candidates", "queries", "extend"])
def test_a_history_without_padding_is_the_same_history(library: Library, isa: str, mode: str) -> None:
    heads, d, rng = 2, 24, np.random.default_rng(8)
    problem = Problem(heads, d, d, JAGGED)
    attention, users = cpu.Attention(library, problem.shape), len(JAGGED)
    rows, starts = jagged(problem.uvqk, problem.lengths, 1)
    if mode == "extend":
        cache = rng.standard_normal((users, 4, 2 * heads * d)).astype(np.float32), np.array([0, 4, 3, 1, 0, 2, 4])
        buckets = rng.integers(0, 129, (users, problem.rows, 4 + problem.rows)).astype(np.uint8)
        whole, out = problem.poisoned(), np.full((1, rows.shape[1], heads * d), np.nan, np.float32)
        attention.attention(problem.uvqk, buckets, problem.lengths, out=whole, cache=cache)
        attention.attention(rows, buckets, problem.lengths, out=out, cache=cache, starts=starts)
        for b, n in enumerate(problem.lengths):
            assert np.array_equal(out[0, starts[b] : starts[b] + n], whole[b, :n])
        return
    asked = rng.standard_normal((users, 5, problem.width)).astype(np.float32)
    buckets = rng.integers(0, 129, (users, 1, problem.rows)).astype(np.uint8)
    outs = [np.full((users, 5, heads * d), np.nan, np.float32) for _ in range(2)]
    for history, out, first in ((problem.uvqk, outs[0], None), (rows, outs[1], starts)):
        if mode == "candidates":
            attention.candidates(
                history, asked, buckets, problem.lengths[:, None], out=out, v_offset=heads * d, k_offset=3 * heads * d,
                starts=first,
            )  # fmt: skip
        else:
            uq, kv = (np.ascontiguousarray(part[..., : 2 * heads * d]) for part in (asked, history))
            positions = np.repeat(problem.lengths[:, None] - 1, 5, axis=1)
            attention.queries(uq, kv, buckets, positions, out=out, starts=first)
    assert np.array_equal(*outs)
    assert np.isfinite(outs[0]).all()


def test_starts_that_make_no_sense_are_refused(library: Library) -> None:
    problem = Problem(1, 16, 16, (20, 10))
    attention, out = cpu.Attention(library, problem.shape), np.zeros((1, 30, 16), np.float32)
    rows = np.concatenate([problem.uvqk[0], problem.uvqk[1, :10]])[None]
    for starts, message in (
        ([0, 20], "no starts of 2 users"),
        ([0, 20, 31], "no starts of 2 users"),
        ([0, 19, 30], "more rows than stand before"),
        ([0, 21, 30], "more rows than stand before"),
        ([-1, 20, 30], "start before the first"),
    ):
        with pytest.raises(KernelError, match=message):
            attention.attention(rows, None, problem.lengths, out=out, starts=np.array(starts, dtype=np.int64))
    with pytest.raises(KernelError, match="need the lengths"):
        attention.attention(rows, None, None, out=out, starts=np.array([0, 20, 30], dtype=np.int64))


def test_equals_the_eager_module(library: Library, isa: str) -> None:
    config = HSTUConfig(num_items=9, embedding_dim=8, num_layers=1, num_heads=2, qk_dim=50, v_dim=50, max_history=70)
    module, generator = HSTUAttention(config), torch.Generator().manual_seed(5)
    with torch.no_grad():
        module.position_bias.normal_(generator=generator)
        module.time_bias.normal_(generator=generator)
        uvqk = torch.randn((3, 70, config.uvqk_dim), generator=generator)
        buckets = torch.randint(0, 129, (3, 70, 70), generator=generator)
        lengths = torch.tensor([70, 12, 0])
        expected = module(uvqk, buckets, lengths).numpy()
    shape = cpu.Shape(
        heads=2,
        qk_dim=50,
        v_dim=50,
        max_length=config.max_length,
        position_bias=module.position_bias.detach().numpy(),
        time_bias=module.time_bias.detach().numpy(),
    )
    out = np.full((3, 70, 100), np.nan, np.float32)
    cpu.Attention(library, shape).attention(uvqk.numpy(), buckets.numpy(), lengths.numpy(), out=out)
    for b, n in enumerate(lengths):
        assert_equal(out[b, :n], expected[b, :n])


def test_a_mask_takes_keys_away(library: Library, isa: str) -> None:
    problem = Problem(2, 16, 16, (90, 40))
    rng = np.random.default_rng(4)
    mask = (rng.random((2, 90, 90)) < 0.5).astype(np.uint8)
    out = problem.poisoned()
    cpu.Attention(library, problem.shape).attention(problem.uvqk, problem.buckets, problem.lengths, out=out, mask=mask)
    _, v, q, k = naive.split(problem.uvqk[0, :90].astype(np.float64), 2, 16)
    u = naive.silu(problem.uvqk[0, :90, :32].astype(np.float64))
    position, time = problem.tables()
    for i in (0, 1, 50, 89):
        j = np.arange(i + 1)
        bias = position[j - i + problem.shape.max_length - 1] + time[problem.buckets[0, i, : i + 1]]
        weights = naive.silu(np.einsum("hd,jhd->hj", q[i], k[: i + 1]) + bias) / problem.shape.max_length
        attended = np.einsum("hj,jhd->hd", weights * mask[0, i, : i + 1], v[: i + 1])
        assert_equal(out[0, i], naive.gate(u[i], attended, 1e-6))


def test_an_answer_depends_on_nothing_but_its_row(library: Library, isa: str) -> None:
    problem = Problem(4, 40, 40, (150, 149, 64, 7))
    answers = []
    for threaded in (False, True, True):
        answers.append(problem.poisoned())
        cpu.Attention(library, problem.shape).attention(
            problem.uvqk, problem.buckets, problem.lengths, out=answers[-1], threaded=threaded
        )
    alone = np.full((1, 64, problem.out_width), np.nan, np.float32)
    uvqk, buckets = problem.uvqk[2:3, :64].copy(), problem.buckets[2:3, :64, :64].copy()
    cpu.Attention(library, problem.shape).attention(uvqk, buckets, problem.lengths[2:3], out=alone)
    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[1], answers[2])
    assert np.array_equal(alone[0], answers[0][2, :64])


@pytest.mark.parametrize("causal", [True, False])
def test_time_buckets_equal_those_of_the_model(library: Library, causal: bool) -> None:
    rng = np.random.default_rng(6)
    edges = np.array([0, *THRESHOLDS, 2**63 - 1], dtype=np.int64)
    near_edges = np.concatenate([edges[:-1] + d for d in (-1, 0, 1)])
    start = np.concatenate([near_edges, rng.integers(0, 2**62, 40)])[None].repeat(2, axis=0)
    end = np.concatenate([np.zeros(len(start[0]) - 40, np.int64), rng.integers(0, 2**62, 40)])[None].repeat(2, axis=0)
    expected = time_buckets(torch.from_numpy(start[:, :, None] - end[:, None, :])).numpy()
    if causal:
        expected = np.tril(expected)
    assert np.array_equal(cpu.time_buckets(library, start, end, edges, causal=causal), expected)


@pytest.mark.parametrize(
    ("lengths", "prefix", "message"),
    [([200], None, "outside 0..queries"), ([-1], None, "outside 0..queries"), ([20], 9, "longer than max_length")],
)
def test_a_call_that_makes_no_sense_is_refused(
    library: Library, lengths: list[int], prefix: int | None, message: str
) -> None:
    problem = Problem(1, 16, 16, (20,))
    cached = None
    if prefix is not None:
        cached = (np.zeros((1, prefix, 32), np.float32), np.array([prefix], dtype=np.int64))
    with pytest.raises(KernelError, match=message):
        cpu.Attention(library, problem.shape).attention(
            problem.uvqk, None, np.array(lengths), out=problem.poisoned(), cache=cached
        )


def test_wrong_types_and_shapes_are_refused(library: Library) -> None:
    problem = Problem(1, 16, 16, (20,))
    good = {"out": problem.poisoned()}
    with pytest.raises(KernelError, match="float32"):
        cpu.Attention(library, problem.shape).attention(
            problem.uvqk.astype(np.float64), None, None, out=problem.poisoned().astype(np.float64)
        )
    with pytest.raises(KernelError, match="does not fit"):
        cpu.Attention(library, problem.shape).attention(problem.uvqk[..., :-1], None, None, **good)
    with pytest.raises(KernelError, match="contiguous"):
        cpu.Attention(library, problem.shape).attention(problem.uvqk, problem.buckets[:, ::-1], None, **good)
    with pytest.raises(KernelError, match="has no"):
        library.limit_isa("sse2")  # type: ignore[arg-type]


def test_the_same_compiler_makes_the_same_bytes(library_file: Path, tmp_path: Path) -> None:
    build(tmp_path)
    for file in (LIBRARY, OPERATIONS):
        first = library_file.with_name(file).read_bytes()
        assert (tmp_path / file).read_bytes() == first
        assert str(openvino_folder()).encode() not in first


def test_a_missing_compiler_or_library_is_said(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="no gcc-none here"):
        build(tmp_path, compiler="gcc-none")
    with pytest.raises(KernelError, match="cannot be loaded"):
        load(tmp_path / LIBRARY)


def test_int8_output_is_the_float_output_rounded_row_by_row(library: Library, isa: str) -> None:
    problem = Problem(3, 16, 20, (70, 33, 0))
    attention = cpu.Attention(library, problem.shape)
    wide, narrow = problem.poisoned(), np.full((3, 70, 60), 99, np.int8)
    scales = np.full((3, 70), np.nan, np.float32)
    attention.attention(problem.uvqk, problem.buckets, problem.lengths, out=wide)
    attention.attention(problem.uvqk, problem.buckets, problem.lengths, out=narrow, out_scales=scales)
    assert np.allclose(scales, np.abs(wide).max(axis=2) / 127, rtol=1e-6)
    assert np.abs(narrow * scales[..., None] - wide).max() <= 0.5001 * scales.max()
    assert np.abs(narrow).max() == 127
