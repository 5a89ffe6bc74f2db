"""Meta's public research HSTU, read from the file its trainer writes.

`torch.save({"epoch", "model_state_dict", "optimizer_state_dict"})`, keys under `module.` (the wrapper of
distributed training), as facebookresearch/generative-recommenders does in
`generative_recommenders/research/trainer/train.py`. The shapes tell D, N, the layers and the products
H·dqk and H·dv; they do not tell H, nor how N splits into history and generated items (N = history +
generated + 1), so those two are arguments. The file is read with torch's restricted unpickler alone.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu.checkpoints.weights import check_finite, check_names, model_from_weights
from hstu.config import NUM_TIME_BUCKETS, HSTUConfig
from hstu.errors import InputError
from hstu.model import HSTU

PREFIX = "module."
LAYERS = "_hstu._attention_layers."
MASK = "_attn_mask"
ITEMS = "_embedding_module._item_emb.weight"
POSITIONS = "_input_features_preproc._pos_emb.weight"

# One row per tensor: its name in the file (below a layer for the second table), its shape in these letters:
# V item rows (row 0 = padding) · D embedding width · N positions · R = 2N - 1 · W width of u, v, q, k together ·
# O = H·dv · S time buckets.
_MODEL_TENSORS = {MASK: "NN", ITEMS: "VD", POSITIONS: "ND"}
_LAYER_TENSORS = {
    "_uvqk": "DW",
    "_rel_attn_bias._ts_w": "S",
    "_rel_attn_bias._pos_w": "R",
    "_o.weight": "DO",
    "_o.bias": "D",
}
# What cannot be unpickled raises whatever the broken bytes happen to lead to: these types, found by feeding
# thousands of damaged files to torch.load(weights_only=True).
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, struct.error, OSError, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaCheckpoint:
    """A model in eval mode, and the epoch after which its file was written (None: the file does not say)."""

    model: HSTU
    epoch: int | None


def load_meta_research(path: Path, *, num_heads: int, max_generated: int) -> MetaCheckpoint:
    """The model of a checkpoint file, bit for bit in its weights.

    Raises InputError when the file is missing, truncated, corrupt or tries to run code; when tensors are
    missing, extra, wrongly shaped (all are listed) or not finite; when the widths do not divide by `num_heads`.
    """
    values = _read(path)
    weights, epoch = values.get("model_state_dict"), values.get("epoch")
    if not isinstance(weights, Mapping) or not weights:
        raise InputError(
            f"{path}: not a checkpoint of Meta's trainer",
            got=f"keys {sorted(map(str, values))[:10]}",
            expected="epoch, model_state_dict, optimizer_state_dict",
        )
    source = str(path)
    prefix = PREFIX if any(str(name).startswith(PREFIX) for name in weights) else ""
    sizes, num_layers = _sizes(weights, prefix)
    names = _names(prefix, num_layers)
    shapes = {name: tuple(sizes.get(letter) for letter in letters) for name, letters in names.items()}
    check_names(weights, shapes, source=source, fix=_fix(weights), booleans=(prefix + MASK,))
    if not torch.equal(weights[prefix + MASK], torch.ones(sizes["N"], sizes["N"], dtype=torch.bool).triu(1)):
        raise InputError(
            f"{source}: the attention mask {prefix}{MASK} is not the causal one",
            expected="true strictly above the diagonal (what must not be seen), false elsewhere",
            fix="only the causal variant can be compiled",
        )
    check_finite({name: value for name, value in weights.items() if name != prefix + MASK}, source=source)
    config = _config(sizes, num_layers, num_heads=num_heads, max_generated=max_generated, source=source)
    model = model_from_weights(config, _renamed(weights, prefix, num_layers), source=source)
    return MetaCheckpoint(model=model, epoch=epoch if isinstance(epoch, int) else None)


def _read(path: Path) -> dict[str, Any]:
    """The file's outermost dict; nothing in it is executed, whatever it asks for."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file", expected="a checkpoint as torch.save writes it")
    damaged = "copy it again: it may be truncated, or not be a checkpoint at all"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()  # torch itself does not look at the check sums
            if broken is not None:
                raise InputError(f"{path}: corrupt: the check sum of {broken!r} is wrong", fix=damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on odd pickle protocols; the error below says enough
            values = torch.load(path, weights_only=True, map_location="cpu")
    except _UNREADABLE as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted and isinstance(error, pickle.UnpicklingError):
            raise InputError(
                f"{path}: holds more than weights: to load it would mean to run code. Nothing in it was executed",
                got=f"the Python object {wanted[1]}",
                expected="tensors, numbers, strings, lists and dicts only",
                fix="if you trust its origin, save model.state_dict() alone with torch.save and pass that file",
            ) from None
        raise InputError(f"{path}: cannot be read as a checkpoint ({_reason(error)})", fix=damaged) from None
    if not isinstance(values, dict):
        expected = "a dict with epoch, model_state_dict, optimizer_state_dict"
        raise InputError(f"{path}: not a checkpoint of Meta's trainer", got=type(values).__name__, expected=expected)
    return values


def _reason(error: BaseException) -> str:
    """One line of an error; torch's advice to load the file without its restrictions is not passed on."""
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        return found[1][:200] if found else "not a file that torch.save wrote"
    if isinstance(error, (RuntimeError, OSError, EOFError, zipfile.BadZipFile)) and str(error).strip():
        return str(error).strip().splitlines()[0][:200]
    return "not a file that torch.save wrote"


def _names(prefix: str, num_layers: int) -> dict[str, str]:
    """Every tensor of the format, with the letters of its shape."""
    names = {prefix + name: letters for name, letters in _MODEL_TENSORS.items()}
    for index in range(num_layers):
        names |= {f"{prefix}{LAYERS}{index}.{name}": letters for name, letters in _LAYER_TENSORS.items()}
    return names


def _sizes(weights: Mapping[str, object], prefix: str) -> tuple[dict[str, int], int]:
    """The size each letter stands for, and the number of layers.

    Several tensors tell the same size; the majority decides, so that a single wrong tensor is the one
    that gets named. A letter that no tensor tells is absent.
    """
    pattern = re.compile(re.escape(prefix + LAYERS) + r"(\d+)\.(.+)")
    layers = set()
    votes: dict[str, Counter[int]] = {}
    for name, value in weights.items():
        match = pattern.fullmatch(str(name))
        if match:
            layers.add(match[1])
        letters = _LAYER_TENSORS.get(match[2]) if match else _MODEL_TENSORS.get(str(name).removeprefix(prefix))
        if letters is None or not isinstance(value, Tensor) or value.dim() != len(letters):
            continue
        for letter, size in zip(letters, value.shape, strict=True):
            if letter == "R":
                letter, size = "N", (size + 1) // 2
            votes.setdefault(letter, Counter())[size] += 1
    sizes = {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}
    sizes["S"] = NUM_TIME_BUCKETS + 1
    if "N" in sizes:
        sizes["R"] = 2 * sizes["N"] - 1
    return sizes, max(1, len(layers))


def _config(
    sizes: Mapping[str, int], num_layers: int, *, num_heads: int, max_generated: int, source: str
) -> HSTUConfig:
    value_width = sizes["O"]
    query_width = sizes["W"] // 2 - value_width  # W = 2·H·dv + 2·H·dqk
    if sizes["W"] % 2 or query_width < 1:
        raise InputError(
            f"{source}: the width of _uvqk does not fit that of _o.weight",
            got=f"_uvqk {sizes['W']} wide, _o.weight {value_width} wide",
            expected="_uvqk = 2·H·dv + 2·H·dqk wide, _o.weight = H·dv wide",
        )
    if value_width % num_heads or query_width % num_heads:
        smaller = min(value_width, query_width)
        divisors = [n for n in range(1, smaller + 1) if value_width % n == 0 and query_width % n == 0]
        raise InputError(
            f"{source}: the widths do not divide by num_heads",
            got=f"num_heads {num_heads}, H·dv {value_width}, H·dqk {query_width}",
            expected=f"num_heads one of {', '.join(map(str, divisors))}",
            fix="pass the num_heads that the model was trained with: no shape tells it",
        )
    if sizes["V"] < 2 or sizes["N"] - max_generated - 1 < 1:
        raise InputError(
            f"{source}: no room for a history",
            got=f"{sizes['N']} positions, max_generated {max_generated}, {sizes['V']} item rows",
            expected="positions = history + max_generated + 1, history >= 1, and at least 2 item rows",
            fix="pass the gr_output_length that the model was trained with as max_generated",
        )
    return HSTUConfig(
        num_items=sizes["V"] - 1,
        embedding_dim=sizes["D"],
        num_layers=num_layers,
        num_heads=num_heads,
        qk_dim=query_width // num_heads,
        v_dim=value_width // num_heads,
        max_history=sizes["N"] - max_generated - 1,
        max_generated=max_generated,
        absent_query_time="zero",
    )


def _renamed(weights: Mapping[str, Tensor], prefix: str, num_layers: int) -> dict[str, Tensor]:
    """The same weights under the names of `hstu.model.HSTU`; `_uvqk` is transposed, as nn.Linear keeps it."""
    renamed = {
        "item_embedding.weight": weights[prefix + ITEMS],
        "position_embedding.weight": weights[prefix + POSITIONS],
    }
    for index in range(num_layers):
        layer = f"{prefix}{LAYERS}{index}."
        renamed |= {
            f"layers.{index}.uvqk.weight": weights[layer + "_uvqk"].T,
            f"layers.{index}.attention.position_bias": weights[layer + "_rel_attn_bias._pos_w"],
            f"layers.{index}.attention.time_bias": weights[layer + "_rel_attn_bias._ts_w"],
            f"layers.{index}.output.weight": weights[layer + "_o.weight"],
            f"layers.{index}.output.bias": weights[layer + "_o.bias"],
        }
    return renamed


def _fix(weights: Mapping[str, object]) -> str:
    if any("_hstu_transducer." in str(name) for name in weights):
        return "this is Meta's ranker (DLRMv3), another model: only the research HSTU can be compiled"
    return "pass a checkpoint of Meta's research HSTU, whole and unchanged"
