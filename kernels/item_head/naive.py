"""The truth about the item head: every score, then the best K. Letters as in `hstu.signature`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def top_items(embeddings: Array, table: Array, factors: Array, results: int) -> tuple[Array, Array]:
    """Scores [B, K] falling and indices [B, K] of the items with the largest embedding · row · factor.

    embeddings [B, D], table [V, D], factors [V]; of equal scores the lower index comes first.
    """
    scores = (embeddings @ table.T) * factors
    order = np.argsort(-scores, axis=1, kind="stable")[:, :results]
    return np.take_along_axis(scores, order, axis=1), order
