"""The projection kernel against float64, on every instruction set: odd shapes, all types, no row but its own."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from kernels.cpu.library import Array, KernelError, Library
from kernels.projection import naive
from kernels.projection.cpu import PackedWeight

Compute = Literal["fp32", "bf16", "int8"]
SHAPES = [(1, 1, 1), (3, 5, 7), (13, 64, 96), (14, 40, 33), (15, 250, 100), (61, 96, 1), (130, 257, 65), (450, 34, 47)]


def narrowed(values: Array) -> tuple[Array, Array]:
    """bf16 as uint16, and what it stands for in float64."""
    narrow = torch.from_numpy(values).bfloat16()
    return narrow.view(torch.uint16).numpy(), narrow.double().numpy()


class Problem:
    """Rows, a packed weight, and what their product should be."""

    def __init__(self, library: Library, compute: Compute, rows: int, depth: int, columns: int) -> None:
        rng = np.random.default_rng(rows + depth)
        self.compute, self.wide = compute, compute == "bf16" and library.isa == "avx512_bf16"
        self.rows = (rng.standard_normal((rows, depth)) * 2 + 0.5).astype(np.float32)
        self.bias = rng.standard_normal(columns).astype(np.float32)
        self.residual = rng.standard_normal((rows, columns)).astype(np.float32)
        weight = (rng.standard_normal((depth, columns)) / np.sqrt(depth)).astype(np.float32)
        self.scales: Array | None = None
        if compute == "int8":
            self.scales = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
            stored = np.rint(weight / self.scales).astype(np.int8)
            self.weight = stored * self.scales.astype(np.float64)
        elif compute == "bf16":
            stored, self.weight = narrowed(weight)
        else:
            stored, self.weight = weight, weight.astype(np.float64)
        self.packed = PackedWeight(
            library, stored, scales=self.scales, bias=self.bias, bf16=compute == "bf16", threaded=False
        )

    def expected(self, rows: Array, epsilon: float | None, residual: Array | None) -> Array:
        exact = rows.astype(np.float64)
        if epsilon is not None:
            exact = naive.layer_norm(exact, epsilon)
        if self.compute == "int8":
            integers, scale = naive.quantized(exact)
            exact = integers * scale[:, None]
        elif self.wide:
            exact = narrowed(exact.astype(np.float32))[1]
        return naive.project(exact, self.weight, self.bias.astype(np.float64), residual)

    def limit(self) -> float:
        """A rounding of the rows that falls the other way moves a sum by a step of one weight."""
        if self.compute == "int8":
            return 0.05
        return 2e-2 if self.wide else 3e-5

    def answer(self, rows: Array, *, out: Array | None = None, **options: object) -> Array:
        out = np.full((len(rows), self.packed.columns), np.nan, np.float32) if out is None else out
        self.packed.project(rows, out=out, **options)  # type: ignore[arg-type]
        return out


@pytest.mark.parametrize("compute", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_truth(
    library: Library, isa: str, compute: Compute, shape: tuple[int, int, int]
) -> None:
    problem = Problem(library, compute, *shape)
    for epsilon in (None, 1e-6):
        for residual in (None, problem.residual):
            for threaded in (False, True):
                got = problem.answer(problem.rows, epsilon=epsilon, residual=residual, threaded=threaded)
                expected = problem.expected(problem.rows, epsilon, residual)
                assert np.abs(got - expected).max() <= problem.limit()
                assert np.abs(got - expected).mean() <= problem.limit() / 20


@pytest.mark.parametrize("compute", ["fp32", "bf16", "int8"])
def test_a_row_depends_on_no_other_row_and_on_no_thread(library: Library, isa: str, compute: Compute) -> None:
    """Bit by bit: alone, among few and among many, on one thread and on all."""
    problem = Problem(library, compute, 470, 70, 45)
    whole = problem.answer(problem.rows, epsilon=1e-6, residual=problem.residual, threaded=False)
    for count in (1, 2, 10, 14, 15, 29, 100, 300, 470):
        for threaded in (False, True):
            part = problem.answer(
                problem.rows[:count], epsilon=1e-6, residual=problem.residual[:count], threaded=threaded
            )
            assert np.array_equal(part, whole[:count])
    poisoned = problem.rows.copy()
    poisoned[7] = np.nan
    answer = problem.answer(poisoned, epsilon=1e-6, residual=problem.residual)
    others = np.arange(470) != 7
    assert np.array_equal(answer[others], whole[others])
    assert np.isnan(answer[7]).all()


def test_no_rows_are_no_work(library: Library, isa: str) -> None:
    problem = Problem(library, "int8", 3, 20, 9)
    assert problem.answer(problem.rows[:0]).shape == (0, 9)


def test_rows_and_answers_may_be_bf16(library: Library, isa: str) -> None:
    for compute in ("fp32", "bf16", "int8"):
        problem = Problem(library, compute, 21, 50, 37)  # type: ignore[arg-type]
        rows, exact = narrowed(problem.rows)
        out = np.zeros((21, 37), np.uint16)
        problem.answer(rows, out=out)
        got = (out.astype(np.uint32) << 16).view(np.float32)
        expected = problem.expected(exact, None, None)
        assert np.abs(got - expected).max() <= problem.limit() + 2e-2 * np.abs(expected).max()


def test_rows_may_be_int8_with_scales(library: Library, isa: str) -> None:
    problem = Problem(library, "int8", 33, 70, 50)
    integers, scale = naive.quantized(problem.rows)
    got = problem.answer(
        integers.astype(np.int8), row_scales=scale.astype(np.float32)[:, None], residual=problem.residual
    )
    expected = naive.project(integers * scale[:, None], problem.weight, problem.bias, problem.residual)
    assert np.abs(got - expected).max() <= 1e-4


def test_extreme_integers_do_not_saturate(library: Library, isa: str) -> None:
    """127 times 127 in every place: sums of pairs that 16 bits would not hold."""
    weight = np.full((200, 40), 127, np.int8)
    weight[:, 20:] = -127
    packed = PackedWeight(library, weight, scales=np.ones(40, np.float32))
    out = np.zeros((2, 40), np.float32)
    rows = np.stack([np.full(200, 127, np.int8), np.full(200, -127, np.int8)])
    packed.project(rows, out=out, row_scales=np.ones((2, 1), np.float32))
    assert np.array_equal(out, rows.astype(np.float64) @ weight)


def test_what_does_not_fit_is_refused(library: Library) -> None:
    problem = Problem(library, "int8", 4, 10, 6)
    with pytest.raises(KernelError, match="do not fit"):
        problem.answer(problem.rows[:, :9])
    with pytest.raises(KernelError, match="residual"):
        problem.answer(problem.rows, residual=problem.residual[:3])
    with pytest.raises(KernelError, match="belong to int8 rows"):
        problem.answer(problem.rows, row_scales=np.ones((4, 1), np.float32))
    with pytest.raises(KernelError, match="not multiplied as they are"):
        Problem(library, "fp32", 4, 10, 6).answer(np.ones((4, 10), np.int8), row_scales=np.ones((4, 1), np.float32))
    with pytest.raises(KernelError, match="int8 weight"):
        PackedWeight(library, np.ones((3, 2), np.int8))
    with pytest.raises(KernelError, match="in bf16"):
        PackedWeight(library, np.ones((3, 2), np.float32), bf16=True)


def test_a_weight_packed_for_another_instruction_set_is_refused(library: Library) -> None:
    widest = library.isa
    if widest == "avx2":
        pytest.skip("this CPU has only avx2")
    problem = Problem(library, "fp32", 4, 10, 6)
    library.limit_isa("avx2")
    try:
        with pytest.raises(KernelError, match="packed for"):
            problem.answer(problem.rows)
    finally:
        library.limit_isa(widest)  # type: ignore[arg-type]
