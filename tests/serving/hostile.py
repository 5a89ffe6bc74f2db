"""Random and hostile requests for both doors: ids out of range, floats, wrong types, unknown and unsupported keys."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch

from hstu.config import HSTUConfig

ODD: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**30, 1.5, -0.0, "x", "", "3", [], [[]], {}, [None], ["3"], [1.5]),
    *([-1], [0], [10**12], [True], {"a": 1}, "a" * 5000, [1] * 5000, "1 2 3", "\x00", "٣", "🙂"),
]
UNSUPPORTED: dict[str, list[Any]] = {
    "repetition_penalty": [1.2, 0.5, 0, "x"],
    "presence_penalty": [0.5, -2.0, 9],
    "frequency_penalty": [0.5, "y"],
    "prompt_logprobs": [0, 3, -1],
    "bad_words": [["3"], "3"],
    "allowed_token_ids": [[1, 2], [], [10**9]],
    "structured_outputs": [{"regex": "[0-9]+"}, {"json": {}}, {"choice": ["3"]}, 3],
    "logprobs": [0, 5, 101, 10**6, -1],
    "n": [0, 2, 10**6, -1],
    "temperature": [0, 0.7, -1, 1e9, "hot"],
    "top_p": [0.5, 0, 2],
    "top_k": [1, 0, -7, 10**9],
    "min_p": [0.1, 3],
    "seed": [1, -1, 2**70],
    "stop": ["3", [""], 7],
    "stop_token_ids": [[3], [10**9], "x"],
    "logit_bias": [{"3": 5.0}, {"100000": 1}, {"x": 1}],
    "min_tokens": [1, 50, -1],
    "max_tokens": [0, 1, 3, 10, 10**9, -1, "x", None],
    "echo": [True, "x"],
    "stream": [False, True, "x"],
    "suffix": ["x", ""],
    "priority": [5, 0, "x"],
    "stream_options": [{"include_usage": True}, {"include_usage": 3}, 3],
    "model": ["nobody", 3, None, [], "hstu"],
    "user": ["x", 3],
    "request_id": ["the same", "", 7, "x" * 200, "\ud800", "a/b\n"],
    "cache_salt": ["salt", "", "a@b", 3],
    "use_beam_search": [True, False, "x"],
    "best_of": [1, 3],
    "length_penalty": [0.5, 1],
    "ignore_eos": [True, "x"],
    "return_token_ids": [True, 3],
    "return_tokens_as_token_ids": [True],
    "include_stop_str_in_output": [True],
    "skip_special_tokens": [False, 7],
    "truncate_prompt_tokens": [5, -1, 2**63],
    "truncation_side": ["left", "up"],
    "add_special_tokens": [False, "x"],
    "logprob_token_ids": [[1, 2], [10**9], []],
    "response_format": [{"type": "text"}, {"type": "json_object"}, {"type": "x"}, 3, []],
    "repetition_detection": [{"max_pattern_size": 3}, 3],
    "thinking_token_budget": [3, -5, "x"],
    "kv_transfer_params": [{"a": 1}, 3],
    "ec_transfer_params": [{"do_remote_encode": True}],
    "stream_interval": [0, 2],
    "routed_experts_prompt_start": [-1, 3],
    "watermarking": [True, False],
    "mm_payload": ["none", 3],
    "return_mm_kwargs": [False],
    "return_token_offsets": [True],
    "session_id": ["x", 3],
    "vllm_xargs": [
        *({"exclude_history": True}, {"exclude_history": "x"}, {"deny_items": [1, 2]}, {"deny_items": ["x"]}),
        *(
            {"allow_items": [5, 6, 7, 8]},
            {"allow_items": []},
            {"allow_repeats": 2},
            {"deny_items": [10**30]},
            {"deny_items": [1.5]},
            {"deny_items": None},
            {"kv_transfer_params": 3},
            {"exclude_history": True, "allow_items": [1, 2, 3]},
            {"nonsense": 1},
            7,
            {"deny_items": 3},
        ),
    ],
    "nonsense": [1],
}
BODIES: list[bytes] = [  # no JSON object, or one that not every parser takes
    *(b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"{}", b'{"prompt": [1], "temperature": NaN}'),
    *(b'{"prompt": [1], "temperature": Infinity}', b'{"prompt": [1], "temperature": 1e999}', b"[" * 100_000),
    *(b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", b'{"prompt": [' + b"9" * 5000 + b"]}"),
    *(b'{"prompt": "\\ud800"}', b'{"prompt": [1], "prompt": [2], "max_tokens": 1}', b'{"\\udfff": 1, "prompt": [1]}'),
    *(b'{"data": {"items": [' + b"9" * 5000 + b"]}}", b'{"data": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    *(b'{"input": [1, 2]}', b'{"input": "1 2 999999"}', b'{"input": [], "data": {}}', b'{"input": {"a": 1}}'),
]
ROUTES = [  # of vLLM's, for words and for operators
    *("/v1/chat/completions", "/v1/responses", "/v1/messages", "/invocations", "/tokenize", "/detokenize"),
    *("/inference/v1/generate", "/v1/completions/render", "/classify", "/score", "/rerank", "/v2/embed", "/v1/audio"),
    *("/v1/load_lora_adapter", "/scale_elastic_ep", "/sleep", "/collective_rpc", "/nothing", "/v1/completions/"),
]


def _rows(rng: np.random.Generator) -> str:
    """Base64 of what torch.load may find surprising."""
    rows: Any = _pick(
        rng,
        [
            torch.zeros(3, 24), torch.zeros(3), torch.zeros(0, 24), torch.full((2, 24), torch.nan),
            torch.zeros(1, 24).expand(10**9, 24), torch.zeros(1, 24, dtype=torch.float64).expand(10**8, 24),
            torch.eye(24).to_sparse(), {"a": torch.zeros(3)}, [1], torch.rand(2, 24).bfloat16(),
            torch.zeros(3, 24, dtype=torch.complex64), torch.ones(2, 24), torch.zeros(1, 1, 3, 24),
            torch.ones(2, 24).int(),
        ],
    )  # fmt: skip
    buffer = io.BytesIO()
    torch.save(rows, buffer, _use_new_zipfile_serialization=bool(rng.random() < 0.9))
    raw = bytearray(buffer.getvalue())
    if rng.random() < 0.3:
        for _ in range(8):
            raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
    return base64.b64encode(raw).decode()


def _pick(rng: np.random.Generator, values: list[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def _items(rng: np.random.Generator, config: HSTUConfig) -> list[int]:
    """Mostly a history that can be served; sometimes one id out of range, or too many, or none."""
    length = int(rng.integers(1, config.max_history + 1)) if rng.random() < 0.9 else int(_pick(rng, [0, 25, 300, 5000]))
    items = [int(item) for item in rng.integers(1, config.num_items + 1, size=length)]
    if items and rng.random() < 0.15:
        items[int(rng.integers(len(items)))] = _pick(rng, [0, -1, config.num_items + 1, 2**31, 2**63, 10**25])
    return items


def completion(rng: np.random.Generator, config: HSTUConfig) -> dict[str, Any]:
    """A body for POST /v1/completions."""
    items = _items(rng, config)
    body: dict[str, Any] = {"max_tokens": int(rng.integers(1, 6)), "temperature": 0}
    kind = rng.random()
    body["prompt"] = items if kind < 0.6 else " ".join(map(str, items)) if kind < 0.75 else _pick(rng, ODD)
    if kind > 0.9:
        body["prompt_embeds"] = _pick(
            rng, ["AAAA", "", "not base64!", 3, ["AAAA"], None, "\u00e9", _rows(rng), _rows(rng)]
        )
        if rng.random() < 0.7:
            del body["prompt"]
    if rng.random() < 0.03:
        body["prompt"] = [_items(rng, config) for _ in range(int(_pick(rng, [1, 3, 300])))]
    for _ in range(int(rng.integers(0, 3))):
        name = _pick(rng, list(UNSUPPORTED))
        body[name] = _pick(rng, UNSUPPORTED[name])
    return body


def plain_json(rng: np.random.Generator, config: HSTUConfig) -> Any:
    """The value of "data" for POST /pooling."""
    if rng.random() < 0.03:
        return _pick(rng, ODD)
    items = _items(rng, config)
    data: dict[str, Any] = {
        "items": items,
        "timestamps": sorted(int(t) for t in rng.integers(0, 10**9, size=len(items))),
        "actions": [int(a) for a in rng.integers(0, max(1, config.num_actions), size=len(items))],
    }
    if rng.random() < 0.4:
        data["slate"] = {
            "num_items": int(rng.integers(0, 12)),
            "method": _pick(rng, ["greedy", "sample", "beam", "beam", "best", 3]),
            "width": int(_pick(rng, [1, 4, 16, 0, 257])),
        }
        if rng.random() < 0.3:
            data["slate"][_pick(rng, ["temperature", "seed", "allow_repeats", "nonsense"])] = _pick(rng, ODD)
    if rng.random() < 0.3:
        data["exclude_history"] = True
    if rng.random() < 0.3:
        data[_pick(rng, ["deny_items", "allow_items"])] = [
            int(i) for i in rng.integers(1, config.num_items + 1, size=20)
        ]
    for _ in range(int(rng.integers(0, 2))):
        key = _pick(rng, [*data, "query_time", "k", "deny_items", "allow_items", "embedding", "nonsense"])
        data[key] = _pick(rng, ODD)
    return data
