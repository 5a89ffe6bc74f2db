"""The shape of an HSTU model; one frozen record that every stage, engine and runtime reads.

Letters are those of `hstu.signature`: D embedding width, H heads, N the constant that divides the
attention and sizes the position tables.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hstu.errors import InputError

TASKS = ("engagement", "retention", "monetisation")
NUM_TIME_BUCKETS = 128  # the bias table has one row more: buckets 0..128
LAYER_NORM_EPS = 1e-6
L2_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class HSTUConfig:
    """Meta's research HSTU, plus optional action and time-gap inputs and task heads.

    With `num_actions == num_gap_buckets == 0` and no tasks this is exactly the public research model
    (facebookresearch/generative-recommenders, `research/modeling/sequential/hstu.py`).
    """

    num_items: int  # real items are ids 1..num_items; id 0 is padding
    embedding_dim: int  # D
    num_layers: int
    num_heads: int  # H
    qk_dim: int  # per head
    v_dim: int  # per head
    max_history: int  # the longest history a request may carry
    max_generated: int = 10  # items a slate may add after it
    num_actions: int = 0  # rows of the action table, row 0 = "none"; 0 = the model has no action input
    num_gap_buckets: int = 0  # rows of the time-gap table; 0 = the model has no gap input
    tasks: tuple[str, ...] = ()  # binary outcomes that the rank entry scores, in this order
    head_dim: int = 0  # hidden width of the task heads
    absent_query_time: Literal["zero", "last_event"] = "zero"  # what stands for a query time not given

    def __post_init__(self) -> None:
        for name in ("num_items", "embedding_dim", "num_layers", "num_heads", "qk_dim", "v_dim", "max_history"):
            if getattr(self, name) < 1:
                raise InputError(f"model config: {name} must be positive", got=getattr(self, name), expected=">= 1")
        for name in ("max_generated", "num_actions", "num_gap_buckets", "head_dim"):
            if getattr(self, name) < 0:
                raise InputError(f"model config: {name} must not be negative", got=getattr(self, name))
        if bool(self.tasks) != bool(self.head_dim):
            raise InputError("model config: tasks and head_dim come together", got=(self.tasks, self.head_dim))

    @property
    def max_length(self) -> int:
        """N: positions in the tables and the constant that divides the attention (history + generated + 1)."""
        return self.max_history + self.max_generated + 1

    @property
    def uvqk_dim(self) -> int:
        """Width of the fused projection, split in the order u, v, q, k."""
        return 2 * self.num_heads * (self.v_dim + self.qk_dim)

    @property
    def item_scale(self) -> float:
        """√D, which multiplies item embeddings on input."""
        return math.sqrt(self.embedding_dim)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> HSTUConfig:
        """The config that `to_dict` wrote; unknown or missing keys raise InputError naming the known ones."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values)
        if unknown or missing:
            raise InputError(
                f"{source}: not an HSTU config",
                got=f"unknown {unknown}, missing {missing}",
                expected=", ".join(fields),
            )
        wrong = [name for name, value in values.items() if not _fits(value, str(fields[name].type))]
        if wrong:
            raise InputError(
                f"{source}: values of the wrong type",
                got=", ".join(f"{name}={values[name]!r}" for name in wrong),
                expected=", ".join(f"{name}: {fields[name].type}" for name in wrong),
            )
        return cls(**{**values, "tasks": tuple(values.get("tasks", ()))})

    @classmethod
    def from_pretrained(cls, folder: Path) -> HSTUConfig:
        """Read `config.json` of a Hugging Face style folder, as the checkpoint stage writes it."""
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            expected = "a config.json with an 'hstu' section"
            raise InputError(f"{path}: cannot be read ({error})", expected=expected) from None
        if not isinstance(values, dict) or not isinstance(values.get("hstu"), dict):
            raise InputError(f"{path}: not an HSTU checkpoint", expected="an 'hstu' section with the model's shape")
        return cls.from_dict(values["hstu"], source=str(path))

    def to_pretrained(self) -> dict[str, Any]:
        """The content of `config.json`: what vLLM and transformers read, and our own section `hstu`."""
        return {
            "architectures": ["HSTUForCausalLM"],
            "model_type": "hstu",
            "torch_dtype": "float32",
            "vocab_size": self.num_items + 1,
            "hidden_size": self.embedding_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "max_position_embeddings": self.max_length,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "hstu": self.to_dict(),
        }


def _fits(value: object, hint: str) -> bool:
    """Whether a JSON value is of a field's type, given as it is written above."""
    if hint == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if hint.startswith("tuple"):
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    return value in ("zero", "last_event")
