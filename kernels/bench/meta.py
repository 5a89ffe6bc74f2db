"""Meta's Triton attention (the package generative-recommenders) as a rival, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PACKAGE = "generative_recommenders"
MODULE = f"{PACKAGE}.ops.triton.triton_hstu_attention"


def attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, max_length: int
) -> Callable[[], object] | str:
    """Their attention on jagged q, k, v [T, H, d], scaled as ours; or why it is not to be had."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"{PACKAGE} is not installed"

    def run() -> Tensor:
        return bound(importlib.import_module(MODULE).triton_hstu_mha, q, k, v, offsets, longest, max_length)

    return run


def bound(
    function: Any, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, max_length: int
) -> Tensor:  # fmt: skip
    """What their function answers: its arguments have had several names, and it divides by the longest history, or
    by what it is told."""
    scale = torch.full((1,), 1 / max_length, device=q.device)
    known = {
        "N": longest, "max_seq_len": longest, "alpha": 1.0, "q": q, "k": k, "v": v, "seq_offsets": offsets,
        "causal": True, "invalid_attn_mask_type": "lower_triangular", "attn_scale": scale,
    }  # fmt: skip
    names = inspect.signature(function).parameters
    out: Tensor = function(**{name: value for name, value in known.items() if name in names})
    return out if "attn_scale" in names else out * (longest / max_length)
