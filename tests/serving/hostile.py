"""Random and hostile requests for both doors: ids out of range, floats, wrong types, unknown and unsupported keys."""

from __future__ import annotations

from typing import Any

import numpy as np

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
    "stream": [False],
    "suffix": ["x"],
    "priority": [5],
    "vllm_xargs": [
        *({"exclude_history": True}, {"exclude_history": "x"}, {"deny_items": [1, 2]}, {"deny_items": ["x"]}),
        *(
            {"allow_items": [5, 6, 7, 8]},
            {"allow_items": []},
            {"allow_repeats": 2},
            {"nonsense": 1},
            7,
            {"deny_items": 3},
        ),
    ],
    "nonsense": [1],
}


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
        body["prompt_embeds"] = _pick(rng, ["AAAA", "", "not base64!", 3, ["AAAA"], None])
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
