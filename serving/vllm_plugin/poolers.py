"""What a pooling engine answers: a user embedding, the best items of the whole corpus, or slates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vllm.model_executor.layers.pooler import Pooler
from vllm.tasks import PoolingTask
from vllm.v1.outputs import PoolerOutput
from vllm.v1.pool.metadata import PoolingMetadata

from hstu.model import l2_normalize
from serving.slate import Slate, Slates
from serving.vllm_plugin.plain_json import encode_answer, encode_slates


class UserEmbeddingPooler(Pooler):  # type: ignore[misc]
    """The task `embed`: the L2-normalised state at a history's last event, float32 [D]."""

    def get_supported_tasks(self) -> set[PoolingTask]:
        return {"embed"}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> PoolerOutput:
        last = pooling_metadata.get_pooling_cursor().last_token_indices_gpu
        return list(l2_normalize(hidden_states[last].float()))


class RetrievalPooler(Pooler):  # type: ignore[misc]
    """The task `plugin`: the best items left after a request's deny and allow lists, or the slates it asks for."""

    def __init__(
        self, cosines: Callable[[Tensor], Tensor], search: Callable[[Tensor, int, Slate, list[int]], Slates]
    ) -> None:
        super().__init__()
        self.cosines = cosines  # states [n, D] to cosines [n, num_items + 1], padding -inf
        self.search = search  # state [D], its request in the step, what is asked, the history's items: the slates

    def get_supported_tasks(self) -> set[PoolingTask]:
        return {"plugin"}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> PoolerOutput:
        cursor = pooling_metadata.get_pooling_cursor()
        states = hidden_states[cursor.last_token_indices_gpu]
        finished = cursor.get_finished_mask()
        answers: list[Tensor | None] = [None] * len(finished)
        every = pooling_metadata.pooling_params
        for row, is_finished in enumerate(finished):
            asked = (every[row].extra_kwargs or {}).get("slate")
            if is_finished and asked is not None:
                answers[row] = encode_slates(
                    self.search(states[row], row, Slate(**asked["options"]), asked["history_items"]), asked["k"]
                )
        rows = [row for row, is_finished in enumerate(finished) if is_finished and answers[row] is None]
        scores = self.cosines(states[rows]) if rows else states[:0]
        for row, row_scores in zip(rows, scores, strict=True):
            options = every[row].extra_kwargs or {"k": 1}
            if options.get("allowed") is not None:
                allowed = torch.tensor(options["allowed"], device=scores.device)
                row_scores = torch.full_like(row_scores, -torch.inf).index_copy_(0, allowed, row_scores[allowed])
            if options.get("denied"):
                row_scores.index_fill_(0, torch.tensor(options["denied"], device=scores.device), -torch.inf)
            best, items = row_scores.topk(options["k"])
            embedding = l2_normalize(states[row].float()) if options.get("embedding") else None
            answers[row] = encode_answer(items, best, embedding)
        return answers
