"""What a slate may hold: no item twice, and per request deny and allow lists; on for every request by default.

A request changes it through `SamplingParams.extra_args` (`vllm_xargs` over HTTP):
    deny_items: item ids that may not be chosen        allow_items: item ids that alone may be chosen
    exclude_history: true = nothing of the prompt      allow_repeats: true = an item may come again
Padding is no item: the model itself gives id 0 the logit -inf. Where every item is forbidden, 0 is chosen, with
logit 0: a slate that holds a 0 ends there.
"""

# ruff: noqa: ARG002 — the signatures are vLLM's

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

# What vLLM offers for words, which slates have not: parameter → the values of a request that does not use it
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "prompt_logprobs": (None,),
    "structured_outputs": (None,),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
}
LISTS, SWITCHES = ("deny_items", "allow_items"), ("exclude_history", "allow_repeats")


@dataclass(frozen=True, slots=True)
class Rule:
    """One request's rule. denied int64 [n]; forbidden bool [V + 1], what an allow list leaves out; chosen grows."""

    denied: Tensor | None
    forbidden: Tensor | None
    chosen: list[int] | None


def check_params(sampling_params: SamplingParams) -> None:
    """VLLMValidationError (400 over HTTP) when a constraint is not of the form above."""
    args = sampling_params.extra_args or {}
    for name in LISTS:
        value = args.get(name)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i > 0 for i in value)
        ):
            raise VLLMValidationError(f"{name} must be a list of item ids (1 and up)", parameter=name)
    allowed = set(args.get("allow_items") or ()) - set(args.get("deny_items") or ())
    wanted = 1 if args.get("allow_repeats") else sampling_params.max_tokens or 1
    if args.get("allow_items") is not None and len(allowed) < wanted:
        raise VLLMValidationError(f"{len(allowed)} items are allowed and {wanted} wanted", parameter="allow_items")
    for name in SWITCHES:
        if args.get(name, False) not in (True, False):  # over HTTP `true` arrives as 1.0
            raise VLLMValidationError(f"{name} must be true or false", parameter=name)
    if is_a_beams_step(sampling_params):
        raise VLLMValidationError(
            "vLLM's own beam search makes a beam's items its prompt, where they may repeat: ask POST /pooling for a "
            'slate of the method "beam", or VllmRuntime.slates',
            parameter="use_beam_search",
        )
    for name, absent in UNSUPPORTED.items():
        if getattr(sampling_params, name) not in absent:
            raise VLLMValidationError(
                f"{name} has no meaning for slates; see deny_items, allow_items, exclude_history, allow_repeats",
                parameter=name,
            )


def is_a_beams_step(sampling_params: SamplingParams) -> bool:
    """Whether this is one of the requests that vLLM's own beam search makes of a beam: it alone sets all of these."""
    one_of_many = sampling_params.max_tokens == 1 and (sampling_params.logprobs or 0) >= 2
    return one_of_many and not sampling_params.detokenize and sampling_params.watermarking is False


def item_tensor(items: Iterable[int], num_tokens: int) -> Tensor:
    """The ids that exist, int64; one that does not can neither be denied nor allowed."""
    return torch.tensor([item for item in items if 0 < item < num_tokens], dtype=torch.int64)


class SlateConstraint(LogitsProcessor):  # type: ignore[misc]
    """Forbidden items have the logit -inf before anything is chosen or any score is returned."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.num_tokens = vllm_config.model_config.get_vocab_size()
        self.device = device
        self.rules: dict[int, Rule] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """VLLMValidationError (400 over HTTP) when a constraint is not of the form above."""
        check_params(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rules, batch_update, self._rule)

    def apply(self, logits: Tensor) -> Tensor:
        rows: list[int] = []
        columns: list[int] = []
        for row, rule in self.rules.items():
            if rule.forbidden is not None:
                logits[row].masked_fill_(rule.forbidden, -torch.inf)
            if rule.denied is not None:
                logits[row].index_fill_(0, rule.denied, -torch.inf)
            if rule.chosen:
                columns += rule.chosen
                rows += [row] * len(rule.chosen)
        if rows:
            logits[torch.tensor(rows, device=logits.device), torch.tensor(columns, device=logits.device)] = -torch.inf
        for row in self._close_to_nothing():
            logits[row, 0] = torch.where(logits[row].isneginf().all(), 0.0, logits[row, 0])
        return logits

    def _close_to_nothing(self) -> list[int]:
        """Rows that may have no item left."""
        num_forbidden = {
            row: len(rule.chosen or ()) + (0 if rule.denied is None else len(rule.denied))
            for row, rule in self.rules.items()
        }
        return [r for r, n in num_forbidden.items() if n >= self.num_tokens - 1 or self.rules[r].forbidden is not None]

    def _rule(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> Rule | None:
        args: dict[str, Any] = params.extra_args or {}
        denied = list(args.get("deny_items") or ())
        if args.get("exclude_history"):
            if prompt_ids is None:
                raise ValueError("exclude_history needs the items of the prompt beside its records")
            denied += prompt_ids
        forbidden = None
        if args.get("allow_items") is not None:
            forbidden = torch.ones(self.num_tokens, dtype=torch.bool, device=self.device)
            forbidden[self._ids(args["allow_items"])] = False
        return Rule(
            denied=self._ids(denied) if denied else None,
            forbidden=forbidden,
            chosen=None if args.get("allow_repeats") else output_ids,
        )

    def _ids(self, items: list[int]) -> Tensor:
        return item_tensor(items, self.num_tokens).to(self.device)
