"""POST /pooling with plain JSON: a history in, recommendations out (vLLM's IO-processor plugin `hstu`).

    {"data": {"items": [12, 7], "timestamps": [1600000000, 1600000060], "actions"?: [1, 0], "query_time"?: 1600000100,
              "k"?: 10, "exclude_history"?: false, "deny_items"?: [3], "allow_items"?: [...], "embedding"?: false}}
    {"data": {"item_ids": [31, 5, …], "scores": [0.91, …], "num_cached_events": 0, "embedding"?: […]}}

With "slate": {"num_items": 10, "method"?: "greedy" | "sample" | "beam", "width"?, "temperature"?, "seed"?,
"allow_repeats"?} the answer is the best k (default 1) slates, as `serving.slate` defines them:

    {"data": {"slates": [{"item_ids": […], "scores": […], "log_probability"?: -61.2}, …], "num_cached_events": 0}}

Ids are the model's (1..num_items). Anything else is a 400 that says what was wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from vllm import PoolingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.outputs import PoolingRequestOutput
from vllm.plugins.io_processors.interface import IOProcessor
from vllm.renderers import BaseRenderer

from hstu.config import HSTUConfig
from hstu.data.histories import histories_from_rows
from hstu.errors import InputError
from hstu.signature import num_results
from serving.slate import MAX_WIDTH, Slate, Slates
from serving.vllm_plugin.records import records_from_histories

DEFAULT_RESULTS = 10
_INT64_MAX = 2**63 - 1
_KEYS = {
    *("items", "timestamps", "actions", "query_time", "k"),
    *("exclude_history", "deny_items", "allow_items", "embedding", "slate"),
}
_SLATE_KEYS = {"num_items", "method", "width", "temperature", "seed", "allow_repeats"}


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryRequest:
    """One checked request: the prompt's rows, and what `RetrievalPooler` has to know."""

    rows: torch.Tensor
    options: dict[str, Any]


# vLLM asks for the parameters of a request without saying of which; it asks in the task that read the request.
_options: ContextVar[dict[str, Any]] = ContextVar("options")


class PlainJson(IOProcessor[HistoryRequest, dict[str, Any]]):  # type: ignore[misc]
    """Between the JSON above and vLLM's pooling task `plugin`."""

    def __init__(self, vllm_config: VllmConfig, renderer: BaseRenderer) -> None:
        super().__init__(vllm_config, renderer)
        self.config: HSTUConfig = vllm_config.model_config.hf_config.shape
        self.num_ranks: int = vllm_config.parallel_config.tensor_parallel_size

    def parse_data(self, data: object) -> HistoryRequest:
        """The request that a JSON value holds; VLLMValidationError (a 400) says what is wrong with it."""
        config = self.config
        if not isinstance(data, dict):
            raise VLLMValidationError("data must be an object", parameter="data")
        unknown = sorted(str(key)[:40] for key in set(data) - _KEYS)
        if unknown:
            raise VLLMValidationError(
                f"unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}", parameter="data"
            )
        items = _integers(data, "items", 1, config.num_items)
        times = _integers(data, "timestamps", 0, _INT64_MAX)
        actions = (
            _integers(data, "actions", 0, max(0, config.num_actions - 1)) if "actions" in data else [0] * len(items)
        )
        if not len(items) == len(times) == len(actions):
            raise VLLMValidationError("items, timestamps and actions must be of one length", parameter="timestamps")
        if any(later < earlier for earlier, later in itertools.pairwise(times)):
            raise VLLMValidationError("timestamps fall: sort the events, oldest first", parameter="timestamps")
        row = {"item_ids": items, "timestamps": times, "actions": actions}
        row["query_time"] = [_integer(data.get("query_time", 0), "query_time", 0, _INT64_MAX)]
        try:
            rows = records_from_histories(histories_from_rows([row]), config)[0]
        except InputError as error:
            raise VLLMValidationError(str(error), parameter="items") from None
        denied = _integers(data, "deny_items", 1, config.num_items) if "deny_items" in data else []
        allowed = _integers(data, "allow_items", 1, config.num_items) if "allow_items" in data else None
        exclude_history = _boolean(data, "exclude_history")
        if "slate" in data:
            return HistoryRequest(rows=rows, options=self._slate(data, items, denied, allowed, exclude_history))
        if exclude_history:
            denied = denied + items
        k = _integer(data.get("k", min(DEFAULT_RESULTS, num_results(config))), "k", 1, num_results(config))
        left = len(set(range(1, config.num_items + 1) if allowed is None else allowed) - set(denied))
        if left < k:
            raise VLLMValidationError(f"{left} items are left and k is {k}", parameter="k")
        options = {"k": k, "denied": denied, "allowed": allowed, "embedding": _boolean(data, "embedding")}
        return HistoryRequest(rows=rows, options=options)

    def _slate(
        self, data: dict[str, Any], items: list[int], denied: list[int], allowed: list[int] | None, exclude: bool
    ) -> dict[str, Any]:
        """What `RetrievalPooler` is told about a slate."""
        asked = data["slate"]
        if not isinstance(asked, dict) or not set(asked) <= _SLATE_KEYS or "num_items" not in asked:
            raise VLLMValidationError(
                f"slate must be an object of num_items and {', '.join(sorted(_SLATE_KEYS))}", parameter="slate"
            )
        if self.num_ranks > 1:
            raise VLLMValidationError("slates over JSON need an engine of one tensor-parallel rank", parameter="slate")
        if _boolean(data, "embedding"):
            raise VLLMValidationError("embedding and slate exclude one another", parameter="embedding")
        options: dict[str, Any] = {
            "num_items": _integer(asked["num_items"], "num_items", 1, self.config.max_generated),
            "method": asked.get("method", "greedy"),
            "width": _integer(asked.get("width", 32), "width", 1, MAX_WIDTH),
            "temperature": _number(asked.get("temperature", 1.0), "temperature"),
            "seed": _integer(asked.get("seed", 0), "seed", 0, 2**62 - 1),
            "allow_repeats": _boolean(asked, "allow_repeats"),
            "exclude_history": exclude,
            "deny_items": denied,
            "allow_items": allowed,
        }
        k = _integer(data.get("k", 1), "k", 1, options["width"] if options["method"] == "beam" else 1)
        try:
            Slate(**options).check(self.config, most_in_history=len(set(items) - set(denied)))
        except InputError as error:
            raise VLLMValidationError(str(error), parameter="slate") from None
        return {"slate": {"k": k, "options": options, "history_items": items}}

    def pre_process(self, prompt: HistoryRequest, request_id: str | None = None, **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002
        _options.set(prompt.options)
        return {"prompt_embeds": prompt.rows}

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        params = params or PoolingParams()
        params.task = "plugin"
        params.skip_reading_prefix_cache = False  # vLLM's default for this task is not to use its cache
        params.extra_kwargs = _options.get()
        return params

    def post_process(
        self,
        model_output: Sequence[PoolingRequestOutput],
        request_id: str | None = None,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        (output,) = model_output
        return decode_answer(output.outputs.data) | {"num_cached_events": output.num_cached_tokens}


def encode_answer(item_ids: torch.Tensor, scores: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor:
    """One float64 tensor [1 + 2k (+ D)] (ids are exact in it): k, ids [k], scores [k], embedding [D] or nothing."""
    parts = [torch.tensor([len(item_ids)]), item_ids.cpu(), scores.cpu()]
    if embedding is not None:
        parts.append(embedding.cpu())
    return torch.cat([part.double() for part in parts])


def encode_slates(slates: Slates, k: int) -> torch.Tensor:
    """One float64 tensor: -k (fewer if there are fewer), n, ids [k, n], scores [k, n], log-probabilities [k] if any."""
    ids, scores, totals = slates.item_ids[0, :k], slates.scores[0, :k], slates.log_probabilities
    real = ids[:, 0] > 0
    parts = [torch.tensor([-int(real.sum()), ids.shape[1]]), ids[real].flatten(), scores[real].flatten()]
    if totals is not None:
        parts.append(totals[0, :k][real])
    return torch.cat([part.double() for part in parts])


def decode_slates(data: torch.Tensor) -> Slates:
    """What `encode_slates` packed, as `Slates` of one user."""
    k, n = -int(data[0]), int(data[1])
    ids, scores, totals = data[2 : 2 + k * n], data[2 + k * n : 2 + 2 * k * n], data[2 + 2 * k * n :]
    return Slates(
        item_ids=ids.long().view(1, k, n),
        scores=scores.float().view(1, k, n),
        log_probabilities=totals.float().view(1, k) if len(totals) else None,
    )


def decode_answer(data: torch.Tensor) -> dict[str, Any]:
    """What `encode_answer` or `encode_slates` packed, as the JSON answer has it."""
    if data[0] <= 0:
        slates = decode_slates(data)
        found = [
            {"item_ids": ids, "scores": scores}
            for ids, scores in zip(slates.item_ids[0].tolist(), slates.scores[0].tolist(), strict=True)
        ]
        if slates.log_probabilities is not None:
            for one, total in zip(found, slates.log_probabilities[0].tolist(), strict=True):
                one["log_probability"] = total
        return {"slates": found}
    k = int(data[0])
    answer: dict[str, Any] = {"item_ids": data[1 : 1 + k].long().tolist(), "scores": data[1 + k : 1 + 2 * k].tolist()}
    if len(data) > 1 + 2 * k:
        answer["embedding"] = data[1 + 2 * k :].tolist()
    return answer


def _integer(value: object, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise VLLMValidationError(f"{name} must be a whole number {low}..{high}, got {str(value)[:40]}", parameter=name)
    return value


def _integers(data: dict[str, Any], name: str, low: int, high: int) -> list[int]:
    values = data.get(name)
    if not isinstance(values, list):
        raise VLLMValidationError(f"{name} must be a list of whole numbers {low}..{high}", parameter=name)
    return [_integer(value, name, low, high) for value in values]


def _number(value: object, name: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise VLLMValidationError(f"{name} must be a number, got {str(value)[:40]}", parameter=name)
    return float(value) if abs(value) < 1e9 else math.inf


def _boolean(data: dict[str, Any], name: str) -> bool:
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise VLLMValidationError(f"{name} must be true or false", parameter=name)
    return value
