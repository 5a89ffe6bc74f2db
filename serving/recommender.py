"""Recommendations from a bundle, on the runtime that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from hstu.data.histories import Histories
from hstu.errors import UsageError
from hstu.signature import num_results
from serving.bundle import Bundle
from serving.engine import Array, Engine, check_answers, check_feeds, open_engine
from serving.engine_order import open_default
from serving.fallback import Fallback
from serving.requests import Request, encode_requests

if TYPE_CHECKING:
    from serving.slate import Slate, Slates

RuntimeName = Literal["engine", "vllm", "torch"]
_BATCH = 32


class Retriever(Protocol):
    """Answers histories: user embeddings float32 [B, D], item ids int64 [B, K] and scores float32 [B, K]."""

    runtime: RuntimeName
    precision: str
    fallback: Fallback | None

    def retrieve(self, histories: Histories) -> tuple[Array, Array, Array]: ...


@runtime_checkable
class SlateMaker(Protocol):
    """A retriever that makes slates too."""

    def slates(self, histories: Histories, slate: Slate) -> Slates: ...


class EngineRetriever:
    """Retrieval by an engine's `retrieve` entry; `runtime` says whether it is compiled or eager PyTorch."""

    def __init__(self, engine: Engine, runtime: RuntimeName, *, fallback: Fallback | None = None) -> None:
        self.engine, self.runtime, self.precision = engine, runtime, engine.precision
        self.fallback = fallback  # what this engine stands in for, and why

    def retrieve(self, histories: Histories) -> tuple[Array, Array, Array]:
        feeds = histories.feeds(self.engine.config)
        check_feeds(self.engine.config, "retrieve", feeds)
        outputs = self.engine.run("retrieve", feeds)
        check_answers(self.engine, "retrieve", outputs)
        return outputs["user_embedding"], outputs["top_item_ids"], outputs["top_scores"]


class TorchRetriever(EngineRetriever):
    """Eager PyTorch: retrieval, and slates by full recompute."""

    def slates(self, histories: Histories, slate: Slate) -> Slates:
        import torch

        from hstu.model import history_from_feeds
        from serving.engines.torch import TorchEngine
        from serving.slate import make_slates

        engine = self.engine
        if not isinstance(engine, TorchEngine):
            raise TypeError("slates are made by eager PyTorch or vLLM")
        feeds = histories.feeds(engine.config)
        check_feeds(engine.config, "retrieve", feeds)
        return make_slates(
            engine.model, history_from_feeds({name: torch.from_numpy(value) for name, value in feeds.items()}), slate
        )


class VllmRetriever:
    """Retrieval and slates by vLLM's paged model: its user embedding against every item."""

    runtime: RuntimeName = "vllm"
    fallback: Fallback | None = None

    def __init__(self, bundle: Bundle) -> None:
        from serving.vllm_plugin.runtime import VllmRuntime

        self._runtime = VllmRuntime(bundle.path)
        self._num_results = num_results(bundle.config)
        self.precision = "fp32"

    def retrieve(self, histories: Histories) -> tuple[Array, Array, Array]:
        return self._runtime.retrieve(histories, self._num_results)

    def slates(self, histories: Histories, slate: Slate) -> Slates:
        """The slates of every user (`serving.slate`)."""
        return self._runtime.slates(histories, slate)


def open_retriever(
    bundle: Bundle,
    runtime: RuntimeName,
    *,
    engine: str | None = None,
    threads: int | None = None,
    rebuilt: Path | None = None,
) -> Retriever:
    """The runtime, loaded and ready; `engine` names one of the bundle's engines.

    By default it is the bundle's choice (or what was `rebuilt` of it), and where that cannot run, the next in
    `serving.engine_order`; the retriever then says so in every answer.
    """
    if engine is not None and runtime != "engine":
        raise UsageError("a precision can be chosen for the engine runtime only", got=f"{runtime} at {engine}")
    if runtime == "engine":
        if engine is not None:
            return EngineRetriever(open_engine(bundle.engine_folder(engine), threads=threads), "engine")
        opened, fallback = open_default(bundle, threads=threads, rebuilt=rebuilt)
        return EngineRetriever(opened, "torch" if opened.backend == "torch" else "engine", fallback=fallback)
    if runtime == "torch":
        from serving.engines.torch import open_torch_engine

        return TorchRetriever(open_torch_engine(bundle.path, threads=threads), "torch")
    return VllmRetriever(bundle)


class Recommender:
    """A bundle and a runtime, ready to answer requests."""

    def __init__(self, bundle: Bundle, retriever: Retriever) -> None:
        self.bundle, self.retriever = bundle, retriever
        items = bundle.vocabulary.items
        self._integer_ids = all(item.isascii() and item.isdigit() and item == str(int(item)) for item in items)

    def _raw_item(self, model_id: int) -> str | int:
        """The raw id as the log had it: a number where every raw id is one."""
        raw = self.bundle.vocabulary.item(model_id)
        return int(raw) if self._integer_ids else raw

    def recommend(
        self,
        requests: Sequence[Request],
        *,
        num_items: int,
        embeddings: bool = False,
        slate: Slate | None = None,
        on_cut: Callable[[dict[str, int]], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """One answer a request, in order, best items first; with `slate` the items are the best slate of the user.

        All requests are checked before the first answer is made. `on_cut` is told once which users lost how
        many of their oldest events because the model takes no more than `max_history`.
        """
        config = self.bundle.config
        limit = num_results(config) if slate is None else config.max_generated
        if slate is not None and not hasattr(self.retriever, "slates"):
            raise UsageError(
                "engines make no slates",
                got=self.retriever.runtime,
                expected="vllm or torch",
                fix="pass --runtime vllm",
            )
        if not 1 <= num_items <= limit:
            raise UsageError("that many items cannot be recommended", got=num_items, expected=f"1..{limit}")
        histories, cut = encode_requests(requests, config, self.bundle.vocabulary, max_events=config.max_history)
        if cut and on_cut is not None:
            on_cut(cut)
        answers: list[dict[str, Any] | None] = [None] * len(requests)
        done = 0
        # a slate's seed counts users, so slates are made in one call, in the order of the requests
        for rows in _batches(histories.lengths) if slate is None else [list(range(len(requests)))]:
            batch = histories.select(rows)
            if slate is None:
                user_embedding, item_ids, scores = self.retriever.retrieve(batch)
            else:
                user_embedding, item_ids, scores = None, *_best_slates(self.retriever, batch, slate)
            for place, row in enumerate(rows):
                answer: dict[str, Any] = {
                    "user_id": requests[row].user_id,
                    "items": [
                        {"item_id": self._raw_item(int(item)), "score": float(score)}
                        for item, score in zip(item_ids[place][:num_items], scores[place][:num_items], strict=True)
                    ],
                    "runtime": self.retriever.runtime,
                    "precision": self.retriever.precision,
                }
                if slate is not None:
                    answer["slate"] = slate.method
                if self.retriever.fallback is not None:
                    answer["fallback"] = self.retriever.fallback.to_dict()
                if embeddings and user_embedding is not None:
                    answer["embedding"] = [float(x) for x in user_embedding[place]]
                answers[row] = answer
            done += len(rows)
            if on_progress is not None:
                on_progress(done)
        yield from (answer for answer in answers if answer is not None)


def _best_slates(retriever: Any, histories: Histories, slate: Slate) -> tuple[Array, Array]:
    """Each user's best slate: item ids int64 [B, n] and scores float32 [B, n]."""
    made = retriever.slates(histories, slate)
    return made.item_ids[:, 0].numpy(), made.scores[:, 0].numpy()


def _batches(lengths: Array) -> Iterator[list[int]]:
    """Rows in batches of similar length, so that little of a batch is padding."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), _BATCH):
        yield [int(row) for row in order[start : start + _BATCH]]
