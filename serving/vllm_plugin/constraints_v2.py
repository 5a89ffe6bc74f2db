"""The slate constraint for vLLM's second model runner, which GPUs use; the rules are those of `constraints`.

It reads the items of a request from the runner's own token table. Tested against the first runner's constraint on
tables made by hand; nothing of it has run on a GPU.
"""

# ruff: noqa: ARG002 — the signatures are vLLM's

from __future__ import annotations

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from serving.vllm_plugin.constraints import check_params, item_tensor


class SlateConstraintV2(LogitsProcessor):  # type: ignore[misc]
    """Forbidden items have the logit -inf before anything is chosen or any score is returned."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self.states, self.num_tokens = req_states, req_states.vocab_size
        self.lists: dict[int, Tensor] = {}  # slot → ids its deny and allow lists forbid
        device, slots = req_states.device, req_states.max_num_reqs
        self.from_prompt = torch.zeros(slots, dtype=torch.bool, device=device)  # the history is forbidden
        self.repeats = torch.zeros(slots, dtype=torch.bool, device=device)  # chosen items may come again

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """VLLMValidationError (400 over HTTP) when a constraint is not of the form of `constraints`."""
        check_params(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        args = sampling_params.extra_args or {}
        self.from_prompt[req_idx] = bool(args.get("exclude_history"))
        self.repeats[req_idx] = bool(args.get("allow_repeats"))
        forbidden = torch.zeros(self.num_tokens, dtype=torch.bool)
        if args.get("allow_items") is not None:
            forbidden[1:] = True
            forbidden[item_tensor(args["allow_items"], self.num_tokens)] = False
        forbidden[item_tensor(args.get("deny_items") or (), self.num_tokens)] = True
        self.lists[req_idx] = forbidden.nonzero().squeeze(1).to(self.states.device)
        return True

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        slots = ctx.expanded_idx_mapping.long()
        items = self.states.all_token_ids.gpu[slots].long()  # [rows, longest]: the prompt, then what was chosen
        place = torch.arange(items.shape[1], device=items.device)
        in_prompt = place < self.states.prompt_len.gpu[slots].unsqueeze(1)
        inside = place <= ctx.pos.unsqueeze(1)
        gone = torch.where(in_prompt, self.from_prompt[slots].unsqueeze(1), ~self.repeats[slots].unsqueeze(1)) & inside
        logits.scatter_(1, torch.where(gone, items.clamp(0, self.num_tokens - 1), 0), -torch.inf)
        for row, slot in enumerate(slots.tolist()):
            logits[row, self.lists[slot]] = -torch.inf
        nothing = logits.isneginf().all(1)
        logits[:, 0] = torch.where(nothing, 0.0, -torch.inf)  # as in `constraints`: a slate that holds a 0 ends there
        return logits
