"""The settings a bundle ships for vLLM's OpenAI-compatible server, one file for each kind of work it does.

vLLM serves float32 weights in 16 bits unless told otherwise and picks the pooling runner for a model that can do
both, so the settings are part of the bundle: one command starts a server that answers as the bundle was checked.
"""

from __future__ import annotations

from pathlib import Path

COMMON = {
    "served-model-name": "hstu",
    "dtype": "float32",
    "enforce-eager": "true",  # no compiler needed where it runs, and ready at once
    "max-num-seqs": "64",
    "kv-cache-memory-bytes": str(512 << 20),
}
SETTINGS = {
    # slates: POST /v1/completions with item ids, text ("12 7 31") or records as prompt_embeds
    "vllm.yaml": {"runner": "generate"} | COMMON,
    # user embeddings and retrieval: POST /v1/embeddings, POST /pooling with plain JSON
    "vllm-pooling.yaml": {"runner": "pooling", "io-processor-plugin": "hstu"} | COMMON,
}


def serve_command(settings: str, *, folder: str = ".") -> str:
    """The command line that starts a server from a bundle with one of its settings files."""
    return f"python -m vllm.entrypoints.openai.api_server --model {folder} --config {folder}/{settings}"


def write_server_settings(folder: Path) -> None:
    """Write `SETTINGS` into `folder`, the same bytes every time; options on the command line win over them."""
    for name, values in SETTINGS.items():
        (folder / name).write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
