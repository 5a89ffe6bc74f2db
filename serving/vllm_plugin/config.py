"""What vLLM is told about an HSTU folder, and the serving defaults that may not be left off by accident."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from hstu.config import HSTUConfig
from hstu.signature import MAX_RESULTS
from serving.vllm_plugin import BLOCK_SIZE, MODEL_TYPE
from serving.vllm_plugin.records import RECORD_WIDTH

CONSTRAINT = f"{__package__}.constraints:SlateConstraint"
CONSTRAINT_V2 = f"{__package__}.constraints_v2:SlateConstraintV2"  # of vLLM's second model runner, which GPUs use


class HSTUPretrainedConfig(PretrainedConfig):
    """The `config.json` that `HSTUConfig.to_pretrained` wrote, as transformers and vLLM read it."""

    model_type = "hstu"
    hstu: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hstu is not None:
            # vLLM sizes its input rows by this, and an input row here is a record; states have the model's own width.
            self.hidden_size = RECORD_WIDTH
            self.head_dim = self.shape.qk_dim

    @property
    def shape(self) -> HSTUConfig:
        """The model's own config; InputError when the section `hstu` is not one."""
        return HSTUConfig.from_dict(self.hstu or {}, source="config.json, section 'hstu'")


class HSTUServingDefaults(VerifyAndUpdateConfig):  # type: ignore[misc]
    """Events as input rows, the slate constraint on, scores after masking, short KV pages."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        if model_config.dtype == torch.float16:  # also what vLLM picks for a pooling engine when nothing is said
            raise ValueError("HSTU is served in float32 or bfloat16: pass --dtype float32 (exact) or bfloat16")
        model_config.enable_prompt_embeds = True
        model_config.tokenizer_mode = MODEL_TYPE  # chooses the renderer, which checks every prompt
        if model_config.runner_type != "generate":
            return
        processors = list(model_config.logits_processors or [])
        if CONSTRAINT not in processors:
            model_config.logits_processors = [*processors, CONSTRAINT]
        if model_config.logprobs_mode == "raw_logprobs":
            model_config.logprobs_mode = "processed_logprobs"
        model_config.max_logprobs = max(model_config.max_logprobs, MAX_RESULTS)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        model_config = vllm_config.model_config
        if vllm_config.use_v2_model_runner and model_config.logits_processors:
            model_config.logits_processors = [
                CONSTRAINT_V2 if one == CONSTRAINT else one for one in model_config.logits_processors
            ]
        cache = vllm_config.cache_config
        if not cache.user_specified_block_size:
            cache.block_size = BLOCK_SIZE
            cache.user_specified_block_size = True
