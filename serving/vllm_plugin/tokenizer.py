"""The tokenizer a bundle ships: token i is the string "i", for item ids 0..num_items and nothing else.

vLLM checks ids in a request against the tokenizer: without one, an id out of the vocabulary would end the
engine. There are no special tokens, since a special string found inside an item's ("1" in "10") would split it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hstu.artifact import encode_json
from hstu.config import HSTUConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write_tokenizer(folder: Path, config: HSTUConfig) -> None:
    """Write `TOKENIZER_FILES` into `folder`; the same config, the same bytes."""
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {str(item): item for item in range(config.num_items + 1)},
            "unk_token": "unknown item",  # not in the vocabulary: an unknown item is an error, not item 0
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_length,
    }
    for name, content in zip(TOKENIZER_FILES, (tokenizer, settings), strict=True):
        (folder / name).write_bytes(encode_json(content))
