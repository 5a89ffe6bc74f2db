"""The item head against every score, computed in float64: the same items, however close their scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.cpu.library import Array, KernelError, Library
from kernels.item_head import naive
from kernels.item_head.cpu import ItemHead


def answer(head: ItemHead, embeddings: Array, results: int, *, threaded: bool = True) -> tuple[Array, Array]:
    scores = np.full((len(embeddings), results), np.nan, np.float32)
    indices = np.full((len(embeddings), results), -1, np.int32)
    head.top_items(embeddings, scores=scores, indices=indices, threaded=threaded)
    return scores, indices


def problem(items: int, dim: int, users: int, seed: int = 0, spread: float = 1.0) -> tuple[Array, Array, Array]:
    """Item rows (of a common direction, the more so the smaller `spread`), reciprocal norms, users of length 1."""
    rng = np.random.default_rng(seed)
    table = (rng.standard_normal(dim) + spread * rng.standard_normal((items, dim))).astype(np.float32)
    factors = (1.0 / np.linalg.norm(table, axis=1)).astype(np.float32)
    embeddings = rng.standard_normal((users, dim)).astype(np.float32)
    return table, factors, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("items", "dim", "users"), [(1, 3, 1), (63, 50, 2), (1000, 64, 7), (3001, 50, 13), (4000, 256, 1)]
)
@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_the_best_items_are_those_of_the_truth(
    library: Library, isa: str, items: int, dim: int, users: int, spread: float
) -> None:
    table, factors, embeddings = problem(items, dim, users, spread=spread)
    results = min(items, 100)
    scores, indices = answer(ItemHead(library, table, factors), embeddings, results)
    exact = (embeddings.astype(np.float64) @ table.astype(np.float64).T) * factors
    expected, _ = naive.top_items(embeddings.astype(np.float64), table.astype(np.float64), factors, results)
    assert np.abs(scores - expected).max() <= 1e-6
    assert np.abs(np.take_along_axis(exact, indices.astype(np.int64), axis=1) - scores).max() <= 1e-6
    assert all(len(set(row)) == results for row in indices.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()


def test_of_equal_scores_the_lower_index_comes_first(library: Library, isa: str) -> None:
    table, factors, embeddings = problem(40, 32, 3)
    table, factors = np.repeat(table, 5, axis=0), np.repeat(factors, 5)
    _, indices = answer(ItemHead(library, table, factors), embeddings, 23)
    _, expected = naive.top_items(embeddings, table, factors, 23)
    assert np.array_equal(indices, expected)


def test_bf16_tables_are_read_as_they_are(library: Library, isa: str) -> None:
    table, factors, embeddings = problem(700, 48, 4)
    narrow = torch.from_numpy(table).bfloat16()
    scores, _ = answer(ItemHead(library, narrow.view(torch.uint16).numpy(), factors), embeddings, 50)
    expected, _ = naive.top_items(embeddings.astype(np.float64), narrow.double().numpy(), factors, 50)
    assert np.abs(scores - expected).max() <= 1e-6


def test_an_answer_depends_on_nothing_but_its_user(library: Library, isa: str) -> None:
    table, factors, embeddings = problem(2500, 64, 9)
    head = ItemHead(library, table, factors)
    together = answer(head, embeddings, 64)
    for threaded in (False, True):
        for row in range(len(embeddings)):
            alone = answer(head, embeddings[row : row + 1].copy(), 64, threaded=threaded)
            assert all(np.array_equal(a[0], t[row]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_answered_with_nan(library: Library, isa: str, poison: float) -> None:
    table, factors, embeddings = problem(300, 32, 3)
    healthy, _ = answer(ItemHead(library, table, factors), embeddings, 20)
    embeddings[1, 5] = poison
    scores, indices = answer(ItemHead(library, table, factors), embeddings, 20)
    assert np.isnan(scores[1]).all()
    assert (0 <= indices).all()
    assert np.array_equal(scores[[0, 2]], healthy[[0, 2]])


def test_a_zero_embedding_scores_zero(library: Library, isa: str) -> None:
    table, factors, _ = problem(100, 32, 1)
    scores, indices = answer(ItemHead(library, table, factors), np.zeros((1, 32), np.float32), 10)
    assert not scores.any()
    assert indices[0].tolist() == list(range(10))


def test_what_does_not_fit_is_refused(library: Library) -> None:
    table, factors, embeddings = problem(30, 16, 1)
    with pytest.raises(KernelError, match="31 results of 30"):
        answer(ItemHead(library, table, factors), embeddings, 31)
    with pytest.raises(KernelError, match="do not fit the table"):
        answer(ItemHead(library, table, factors), embeddings[:, :8].copy(), 3)
    with pytest.raises(KernelError, match="29"):
        ItemHead(library, table, factors[1:])
    with pytest.raises(KernelError, match="float32"):
        ItemHead(library, table.astype(np.float64), factors)
