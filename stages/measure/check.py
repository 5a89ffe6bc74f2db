"""Whether a runtime's answers are right: asked before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hstu.metrics import top_overlap
from hstu.tolerances import TOLERANCES
from serving.engine import Array
from stages.entry_check import worst_error
from stages.measure.cases import Cell

Answer = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """How the answers of a cell's check requests compare with eager PyTorch's in fp32.

    max_abs_error: of any output, the top K judged by score; for slates how far an item falls short of the best
    choice. top10_overlap: mean share of the first ten items in common; None where the entry names no items.
    """

    correct: bool
    max_abs_error: float
    top10_overlap: float | None


def check_answers(
    cell: Cell, precision: str, expected: Sequence[Answer], got: Sequence[Answer], slate_errors: Sequence[float]
) -> Check:
    """The check of all requests together; `slate_errors` are eager's judgement of each generated batch."""
    tolerance = TOLERANCES[precision]
    if cell.entry == "generate":
        worst = max(slate_errors)
        overlap = _overlap("slates", expected, got)
        return Check(correct=worst <= tolerance.max_abs_error, max_abs_error=worst, top10_overlap=overlap)
    worst = max(worst_error(e, g) for e, g in zip(expected, got, strict=True))
    correct = worst <= tolerance.max_abs_error
    if cell.entry not in ("retrieve", "extend"):
        return Check(correct=correct, max_abs_error=worst, top10_overlap=None)
    cosine = _cosine(_joined(expected, "user_embedding"), _joined(got, "user_embedding"))
    return Check(
        correct=bool(correct and cosine.min() >= tolerance.min_cosine and cosine.mean() >= tolerance.min_mean_cosine),
        max_abs_error=worst,
        top10_overlap=_overlap("top_item_ids", expected, got),
    )


def _cosine(left: Array, right: Array) -> Array:
    """Cosine of each pair of rows; a row of zeros, which no user has here, gives NaN and is wrong."""
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        return np.asarray((left * right).sum(axis=1) / norms)


def _overlap(name: str, expected: Sequence[Answer], got: Sequence[Answer]) -> float:
    return top_overlap(_joined(expected, name), _joined(got, name))


def _joined(answers: Sequence[Answer], name: str) -> Array:
    return np.concatenate([answer[name] for answer in answers])
