"""The second runner's constraint on tables made by hand, held against the first runner's rules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]
NUM_TOKENS = 12


def test_the_same_items_are_forbidden_in_both_runners() -> None:
    from vllm import SamplingParams

    from serving.vllm_plugin.constraints import SlateConstraint
    from serving.vllm_plugin.constraints_v2 import SlateConstraintV2

    args = [
        {},
        {"exclude_history": True, "deny_items": [9, 500]},
        {"allow_items": [1, 2, 3, 7], "allow_repeats": True},
        {"allow_repeats": True, "exclude_history": True},
        {"deny_items": list(range(1, 12))},
    ]
    prompts, chosen = [[3, 4], [5, 1, 1], [2], [7, 8], [6]], [[6, 2], [], [7], [7, 1, 9], []]
    slots = [4, 0, 3, 1, 5]
    tokens = torch.full((6, 8), 11, dtype=torch.int32)  # what stands after a request's last token may be anything
    prompt_len = torch.zeros(6, dtype=torch.int32)
    for slot, prompt, items in zip(slots, prompts, chosen, strict=True):
        tokens[slot, : len(prompt) + len(items)] = torch.tensor(prompt + items)
        prompt_len[slot] = len(prompt)
    states = SimpleNamespace(
        device="cpu", max_num_reqs=6, vocab_size=NUM_TOKENS,
        all_token_ids=SimpleNamespace(gpu=tokens), prompt_len=SimpleNamespace(gpu=prompt_len),
    )  # fmt: skip
    second = SlateConstraintV2(SimpleNamespace(), states)  # type: ignore[arg-type]
    model_config = SimpleNamespace(get_vocab_size=lambda: NUM_TOKENS)
    first = SlateConstraint(SimpleNamespace(model_config=model_config), torch.device("cpu"), False)
    for row, (slot, one) in enumerate(zip(slots, args, strict=True)):
        params = SamplingParams(max_tokens=2, extra_args=one)
        second.add_request(slot, params)
        first.rules[row] = first._rule(params, prompts[row], chosen[row])
    logits = torch.randn(5, NUM_TOKENS)
    logits[:, 0] = -torch.inf
    expected = first.apply(logits.clone())
    context = SimpleNamespace(
        expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
        pos=torch.tensor([len(prompt) + len(items) - 1 for prompt, items in zip(prompts, chosen, strict=True)]),
    )
    got = second.apply(logits.clone(), context)  # type: ignore[arg-type]
    assert torch.equal(got, expected)
    assert got[4].argmax() == 0


def test_both_refuse_the_same_parameters() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from serving.vllm_plugin.constraints_v2 import SlateConstraintV2

    SlateConstraintV2.validate_params(SamplingParams(max_tokens=3, extra_args={"deny_items": [4]}))
    for wrong in ({"presence_penalty": 1.0}, {"prompt_logprobs": 1}, {"extra_args": {"deny_items": "4"}}):
        with pytest.raises(VLLMValidationError):
            SlateConstraintV2.validate_params(SamplingParams(max_tokens=3, **wrong))
