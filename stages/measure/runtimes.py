"""The runtimes that are measured, opened: each answers the same requests; each runs in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hstu.config import HSTUConfig
from hstu.data.histories import Histories
from hstu.errors import InputError
from hstu.signature import EntryName, num_results
from serving.engine import BACKENDS, Array, open_engine
from serving.user_state import Origin, StatefulEngine, UserState, extend, start
from stages.measure.cases import SLATE, BenchmarkEntry
from stages.measure.contestants import GEMM, PADDED, Contestant
from stages.measure.gemm import Roof
from stages.measure.requests import Request
from stages.returning import part, seen_before

if TYPE_CHECKING:
    from hstu.model import History
    from serving.engines.openvino_plain import PlainOpenVinoEngine


class Runtime(Protocol):
    """An opened contestant."""

    def answer(self, entry: BenchmarkEntry, request: Request) -> Mapping[str, Array]:
        """The outputs of the entry (`hstu.signature`), of extend as of retrieve; of generate `slates` int64 [B, 10]."""


def prepare(contestant: Contestant, threads: int) -> None:
    """Import what the runtime stands on and size its pools, so that what comes after is the model's own memory."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if contestant.runtime == "vllm":
        from serving.vllm_plugin.runtime import ENVIRONMENT

        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm  # noqa: F401
    elif contestant.backend in BACKENDS:
        import_module(BACKENDS[contestant.backend])
        if contestant.backend == "openvino":  # its CPU plugin, which a first model would load
            import openvino

            openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")
    else:
        import torch

        import serving.engines.torch  # noqa: F401

        torch.set_num_threads(threads)


def open_runtime(contestant: Contestant, threads: int) -> Runtime | Roof:
    """The runtime, ready to answer on `threads` threads."""
    if contestant.runtime == GEMM:
        return Roof(HSTUConfig.from_pretrained(contestant.folder), threads)
    if contestant.runtime == "torch-eager":
        eager = Eager if contestant.precision == "fp32" else EagerBfloat16
        return eager(contestant.folder, threads)
    if contestant.runtime == "torch-features":
        return Features(contestant.folder, threads)
    if contestant.runtime == "torch-compile":
        return Compiled(contestant.folder, threads)
    if contestant.runtime == "onnx-plain":
        return PlainOnnx(contestant.folder, threads)
    if contestant.runtime == "openvino-plain":
        return PlainOpenVino(contestant.folder, contestant.precision, threads)
    if contestant.runtime in ("engine", PADDED):
        return CompiledEngine(contestant.folder, threads)
    return Vllm(contestant.folder)


class Eager:
    """`hstu.model` as it stands; slates by full recompute (`serving.slate`)."""

    def __init__(self, folder: Path, threads: int) -> None:
        from serving.engines.torch import open_torch_engine

        self.engine = open_torch_engine(folder, threads=threads)

    def answer(self, entry: BenchmarkEntry, request: Request) -> Mapping[str, Array]:
        if entry != "generate":
            return self.engine.run(_compiled_entry(entry), request.feeds)
        from serving.slate import greedy_slate

        items, _ = greedy_slate(self.engine.model, _history(request), SLATE)
        return {"slates": items.numpy()}

    def slate_error(self, request: Request, slates: Array) -> float:
        """The most by which the score of any item of `slates` [B, 10] falls short of the best item's at its step.

        The model is causal and all items of a slate stand at the query time, so one pass over history and slate
        gives the state before each of its items.
        """
        import torch

        from hstu.model import l2_normalize
        from serving.slate import append_items, extend_history

        model, chosen = self.engine.model, torch.as_tensor(slates)
        history = _history(request)
        before = (history.lengths - 1).unsqueeze(1) + torch.arange(SLATE)  # where each item's state stands
        full = extend_history(history, SLATE)
        for step in range(SLATE):
            full = append_items(full, chosen[:, step])
        with torch.inference_mode():
            states = model.encode(full)
            rows = states.gather(1, before.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
            scores = model.item_scores(l2_normalize(rows).flatten(0, 1)).unflatten(0, before.shape)
        taken = torch.zeros_like(scores, dtype=torch.bool)  # a slate names no item twice
        for step in range(1, SLATE):
            taken[:, step] = taken[:, step - 1].scatter(1, chosen[:, step - 1 : step] - 1, True)
        scores = scores.masked_fill(taken, -torch.inf)
        shortfall = scores.amax(-1) - scores.gather(2, (chosen - 1).unsqueeze(-1)).squeeze(-1)
        return float(shortfall.max())


class Features:
    """Eager PyTorch without padding in its products, and with a last layer for the last event alone."""

    def __init__(self, folder: Path, threads: int) -> None:
        from serving.engines.torch import open_torch_engine
        from stages.measure.features import Featured

        self.model = Featured(open_torch_engine(folder, threads=threads).model)

    def answer(self, entry: BenchmarkEntry, request: Request) -> Mapping[str, Array]:
        import torch

        if entry != "retrieve":
            raise InputError(f"this runtime has no {entry!r} entry", expected="retrieve")
        with torch.inference_mode():
            embedding, items, scores = self.model.retrieve(_history(request))
        return {
            "user_embedding": embedding.numpy(),
            "top_item_ids": items.numpy(),
            "top_scores": scores.numpy(),
        }


class EagerBfloat16:
    """`hstu.model` with every weight in bfloat16, so that everything is computed in it."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from serving.engines.torch import open_torch_engine

        self.engine = open_torch_engine(folder, threads=threads)
        self.engine.model.to(torch.bfloat16)

    def answer(self, entry: BenchmarkEntry, request: Request) -> Mapping[str, Array]:
        import torch

        from hstu.model import history_from_feeds

        feeds = {name: torch.as_tensor(value) for name, value in request.feeds.items()}
        history, model = history_from_feeds(feeds), self.engine.model
        with torch.inference_mode():
            if entry == "rank":
                return {"task_scores": model.rank(history, feeds["candidate_ids"]).float().numpy()}
            embedding, items, scores = model.retrieve(history)
        return {
            "user_embedding": embedding.float().numpy(),
            "top_item_ids": items.numpy(),
            "top_scores": scores.float().numpy(),
        }


class Compiled:
    """`hstu.model` under torch.compile (inductor, shapes dynamic, so that one compilation serves all lengths)."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from serving.engines.torch import open_torch_engine

        engine = open_torch_engine(folder, threads=threads)
        engine.model.retrieve = torch.compile(engine.model.retrieve, dynamic=True)  # type: ignore[method-assign]
        engine.model.rank = torch.compile(engine.model.rank, dynamic=True)  # type: ignore[method-assign]
        self.engine = engine

    def answer(self, entry: BenchmarkEntry, request: Request) -> Mapping[str, Array]:
        return self.engine.run(_compiled_entry(entry), request.feeds)


class PlainOnnx:
    """The exporter's graph, untouched, on ONNX Runtime with the options our engines have."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.sessions: dict[str, tuple[list[str], Any]] = {}

    def answer(self, entry: BenchmarkEntry, request: Request) -> Mapping[str, Array]:
        import onnxruntime

        from serving.engines.onnxruntime import PROVIDER, session_options

        if entry not in self.sessions:  # one model at a time: the memory of a cell is that of its own entry
            session = onnxruntime.InferenceSession(
                self.folder / f"{_compiled_entry(entry)}.onnx", session_options(self.threads), providers=[PROVIDER]
            )
            self.sessions = {entry: ([output.name for output in session.get_outputs()], session)}
        names, session = self.sessions[entry]
        return dict(zip(names, session.run(names, dict(request.feeds)), strict=True))


class PlainOpenVino:
    """The exporter's graph, untouched, on OpenVINO with the options our engines have."""

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        self.folder, self.precision, self.threads = folder, precision, threads
        self.engine: PlainOpenVinoEngine | None = None

    def answer(self, entry: BenchmarkEntry, request: Request) -> Mapping[str, Array]:
        from serving.engines.openvino_plain import PlainOpenVinoEngine

        name = _compiled_entry(entry)
        if self.engine is None or self.engine.entries != (name,):
            self.engine = None  # one model at a time
            self.engine = PlainOpenVinoEngine(
                self.folder, precision=self.precision, threads=self.threads, entries=(name,)
            )
        return self.engine.run(name, request.feeds)


class CompiledEngine:
    """An engine folder, as `recommend` runs it."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.engine = open_engine(folder, threads=threads)
        origin = Origin(checkpoint="", engine=self.engine.backend, precision=self.engine.precision)
        self.stateful = StatefulEngine(engine=self.engine, origin=origin)
        self.visit: tuple[list[UserState], Histories] | None = None

    def remember(self, request: Request) -> None:
        """The users of the request have been here before their newest events, and have states."""
        seen = seen_before(request.histories, request.new_events)
        states, _ = start(self.stateful, part(request.histories, seen * 0, seen))
        self.visit = states, part(request.histories, seen, request.histories.lengths)

    def answer(self, entry: BenchmarkEntry, request: Request) -> Mapping[str, Array]:
        if entry == "extend":
            if self.visit is None:
                self.remember(request)
            assert self.visit is not None
            (states, new), self.visit = self.visit, None
            return extend(self.stateful, states, new)[1]
        return self.engine.run(_compiled_entry(entry), request.feeds)


class Vllm:
    """The bundle in vLLM: user embeddings, retrieval and greedy slates from a paged cache."""

    def __init__(self, folder: Path) -> None:
        from serving.vllm_plugin.runtime import VllmRuntime

        self.runtime = VllmRuntime(folder)

    def remember(self, request: Request) -> None:
        """No page is left of what was answered before, but of what these users did before their newest events."""
        self.runtime.forget()
        if request.new_events:
            seen = seen_before(request.histories, request.new_events)
            self.runtime.embed(part(request.histories, seen * 0, seen))

    def answer(self, entry: BenchmarkEntry, request: Request) -> Mapping[str, Array]:
        if entry == "rank":
            raise InputError("vLLM is measured on users and slates, not on 'rank'")
        if entry == "generate":
            return {"slates": self.runtime.greedy_slates(request.histories, SLATE)[0]}
        k = num_results(self.runtime.config)
        embedding, items, scores = self.runtime.retrieve(request.histories, k)
        return {"user_embedding": embedding, "top_item_ids": items, "top_scores": scores}


def _history(request: Request) -> History:
    import torch

    from hstu.model import history_from_feeds

    return history_from_feeds({name: torch.as_tensor(value) for name, value in request.feeds.items()})


def _compiled_entry(entry: BenchmarkEntry) -> EntryName:
    if entry == "extend":
        return "retrieve"  # who keeps no state computes the whole history again
    if entry not in ("retrieve", "rank"):
        raise InputError(f"this runtime has no {entry!r} entry", expected="retrieve, rank")
    return entry
