"""HSTU as a vLLM model: what vLLM's entry points call. Importing this costs nothing."""

from __future__ import annotations

ARCHITECTURE = "HSTUForCausalLM"
MODEL_TYPE = "hstu"
BLOCK_SIZE = 16  # events per KV page: vLLM's CPU default of 128 would never hit the prefix cache on short histories


def io_processor() -> str:
    """The class behind the IO-processor plugin `hstu` (entry point `vllm.io_processor_plugins`)."""
    return f"{__name__}.plain_json.PlainJson"


def register() -> None:
    """vLLM knows the config, the model, its defaults, renderer, attention and doors; safe to call again."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return  # by an earlier call, or by a bundle's runtime package installed beside this one

    from serving.vllm_plugin.config import HSTUPretrainedConfig, HSTUServingDefaults
    from serving.vllm_plugin.doors import guard_server
    from serving.vllm_plugin.model import HSTUForCausalLM

    AutoConfig.register(MODEL_TYPE, HSTUPretrainedConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = HSTUServingDefaults
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.attention.HSTUAttentionBackend")
    if MODEL_TYPE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(MODEL_TYPE, f"{__name__}.renderer", "HSTURenderer")
        TokenizerRegistry.register(MODEL_TYPE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    # The class, not its name: a name costs vLLM a subprocess to look inside (seconds at every start).
    ModelRegistry.register_model(ARCHITECTURE, HSTUForCausalLM)
    guard_server()
