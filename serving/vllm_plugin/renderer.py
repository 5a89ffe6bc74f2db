"""The one door into the engine: every prompt is checked here, over HTTP and in process, or it is a 400.

vLLM itself checks little of a prompt (rows of a wrong width, or an id its tokenizer gained on the way, would
end the engine), so a prompt of records, of item ids or of text is held against the model before it is queued.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from hstu.config import HSTUConfig
from hstu.errors import InputError
from serving.vllm_plugin.records import check_records


class HSTURenderer(HfRenderer):  # type: ignore[misc]
    """Takes prompts of records, of item ids (a history without times) and of text ("12 7 31")."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.shape: HSTUConfig = config.model_config.hf_config.shape

    def validate_token_ids(self, token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        """VLLMValidationError unless these are real items, and no more than the model's history holds."""
        wrong = [item for item in token_ids if not 1 <= item <= self.shape.num_items]
        if wrong:
            raise VLLMValidationError(
                f"unknown item {wrong[0]}: items are 1..{self.shape.num_items}", parameter=parameter
            )
        self._check_length(len(token_ids))

    def _check_length(self, num_events: int) -> None:
        if num_events > self.shape.max_history:
            raise VLLMValidationError(
                f"the history has {num_events} events and the model takes {self.shape.max_history}: keep the newest"
            )

    def _check_text(self, prompt: Any) -> None:
        text = prompt.get("prompt") if "prompt_token_ids" not in prompt and "prompt_embeds" not in prompt else None
        for word in text.split() if isinstance(text, str) else ():
            if not (len(word) < 12 and word.isascii() and word.isdigit() and str(int(word)) == word):
                raise VLLMValidationError(f"unknown item {word[:40]!r}: a prompt is item ids, as in '12 7 31'")
            self.validate_token_ids([int(word)])

    def _tokenize_singleton_prompt(self, prompt: Any, params: Any) -> Any:
        self._check_text(prompt)
        return super()._tokenize_singleton_prompt(prompt, params)

    async def _tokenize_singleton_prompt_async(self, prompt: Any, params: Any) -> Any:
        self._check_text(prompt)
        return await super()._tokenize_singleton_prompt_async(prompt, params)

    def _process_embeds(self, prompt: Any) -> Any:
        processed = super()._process_embeds(prompt)
        try:
            items = check_records(processed["prompt_embeds"], self.shape)
        except InputError as error:
            raise VLLMValidationError(str(error), parameter="prompt_embeds") from None
        processed["prompt_embeds"] = processed["prompt_embeds"].to(torch.uint8)  # one key in the prefix cache
        # The items beside the records are for the slate constraint; none of them is run through the model.
        processed["prompt_token_ids"], processed["is_token_ids"] = items, [False] * len(items)
        return processed
