"""Every way a bundle can answer, on the same requests: how far each is from eager PyTorch, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hstu.data.histories import Histories
from hstu.errors import ArtifactError, MissingBackendError
from serving.bundle import Bundle
from serving.engine import Array
from serving.recommender import EngineRetriever, Retriever, open_retriever
from serving.requests import Request, encode_requests
from serving.visits import feeds_for_rank

_BATCH = 32
_SINGLES = 20  # users who are answered alone, for the time that takes
Pair = tuple[Array, Array]  # item ids int64 [k], scores float32 [k], best first
Answerer = Callable[[Histories], list[Pair]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One way to answer. `overlap`: mean share of eager PyTorch's items that are in this one's; None: not run."""

    strategy: str  # engine (retrieve), vllm (a slate), unified (retrieve, then rank)
    runtime: str
    precision: str
    overlap: float | None = None
    same_first: float | None = None  # share of users whose first item is the same
    max_score_error: float | None = None  # of items that both have
    single_ms: float | None = None  # median, one user at a time
    batch_ms: float | None = None  # of a user in batches of 32
    not_run: str = ""


def side_by_side(
    bundle: Bundle, requests: Sequence[Request], *, k: int, threads: int | None = None, vllm: bool = True
) -> Iterator[Compared]:
    """One row a way: eager PyTorch, every engine of the bundle, vLLM; retrieved, ranked, and slates.

    A way that cannot run here gives a row that says why. InputError for requests that are wrong.
    """
    config = bundle.config
    histories, _ = encode_requests(requests, config, bundle.vocabulary, max_events=config.max_history)
    truth: dict[str, list[Pair]] = {}
    ways: list[tuple[str, str | None]] = [("torch", None), *(("engine", name) for name in bundle.engines)]
    if vllm:
        ways.append(("vllm", None))
    for runtime, engine in ways:
        try:
            retriever = open_retriever(bundle, runtime, engine=engine, threads=threads if runtime != "vllm" else None)  # type: ignore[arg-type]
        except (MissingBackendError, ArtifactError) as error:
            yield Compared(strategy="engine", runtime=engine or runtime, precision="", not_run=error.what)
            continue
        for strategy, answer in _strategies(bundle, retriever, k):
            answer(histories.select([0]))  # the first call of a shape prepares
            singles = []
            for row in range(min(_SINGLES, len(histories))):
                began = time.perf_counter()
                answer(histories.select([row]))
                singles.append((time.perf_counter() - began) * 1e3)
            began = time.perf_counter()
            found: list[Pair] = []
            for start in range(0, len(histories), _BATCH):
                found += answer(histories.select(list(range(start, min(start + _BATCH, len(histories))))))
            took_ms = (time.perf_counter() - began) * 1e3
            yield Compared(
                strategy=strategy,
                runtime=engine or runtime,
                precision=retriever.precision,
                single_ms=round(statistics.median(singles), 3),
                batch_ms=round(took_ms / len(histories), 3),
                **_agreement(truth.setdefault(strategy, found), found),
            )
        if isinstance(retriever, EngineRetriever):
            retriever.engine.close()


def _strategies(bundle: Bundle, retriever: Retriever, k: int) -> Iterator[tuple[str, Answerer]]:
    yield "engine", partial(_retrieved, retriever, k)
    if bundle.config.tasks and isinstance(retriever, EngineRetriever):
        yield "unified", partial(_ranked, retriever, k)
    if hasattr(retriever, "slates"):
        yield "vllm", partial(_slates, retriever, min(k, bundle.config.max_generated))


def _retrieved(retriever: Retriever, k: int, histories: Histories) -> list[Pair]:
    _, item_ids, scores = retriever.retrieve(histories)
    return [(item_ids[row, :k], scores[row, :k]) for row in range(len(histories))]


def _ranked(retriever: EngineRetriever, k: int, histories: Histories) -> list[Pair]:
    """Retrieved, then ordered by the mean of the task probabilities."""
    found = []
    for row, (item_ids, _) in enumerate(_retrieved(retriever, k, histories)):
        feeds = feeds_for_rank(histories.select([row]), item_ids, retriever.engine.config)
        scores = retriever.engine.run("rank", feeds)["task_scores"][0].mean(axis=1)
        order = np.argsort(-scores, kind="stable")
        found.append((item_ids[order], scores[order]))
    return found


def _slates(retriever: Any, num_items: int, histories: Histories) -> list[Pair]:
    from serving.slate import Slate

    made = retriever.slates(histories, Slate(num_items=num_items))
    return [(made.item_ids[row, 0].numpy(), made.scores[row, 0].numpy()) for row in range(len(histories))]


def _agreement(expected: Sequence[Pair], found: Sequence[Pair]) -> dict[str, Any]:
    overlaps, firsts, errors = [], [], [0.0]
    for (their_ids, their_scores), (our_ids, our_scores) in zip(expected, found, strict=True):
        _, theirs, ours = np.intersect1d(their_ids, our_ids, return_indices=True)
        overlaps.append(len(theirs) / max(1, len(their_ids)))
        firsts.append(float(their_ids[0] == our_ids[0]))
        errors.append(float(np.abs(their_scores[theirs] - our_scores[ours]).max(initial=0.0)))
    return {
        "overlap": round(float(np.mean(overlaps)), 4),
        "same_first": round(float(np.mean(firsts)), 4),
        "max_score_error": float(f"{max(errors):.3g}"),
    }


def text_table(rows: Sequence[Compared]) -> str:
    """The rows as a table in Markdown."""
    header = ["strategy", "runtime", "precision", "overlap", "same first", "score error", "one user ms", "batch ms"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        figures = (row.overlap, row.same_first, row.max_score_error, row.single_ms, row.batch_ms)
        cells = [f"{value:g}" for value in figures if value is not None] or [row.not_run, "", "", "", ""]
        lines.append([row.strategy, row.runtime, row.precision, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
